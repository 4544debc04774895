"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Policy = Literal["crop", "squash", "pad"]
Noise = Literal["image", "shared"]
Precision = Literal["float32", "bfloat16", "float16"]
HeadName = Literal["ridge", "logistic", "knn", "linear", "bn-linear", "mlp", "attention"]
Metric = Literal["cosine", "ip", "l2"]
Kind = Literal["auto", "flat", "ivf", "hnsw", "ivf-pq"]
Images = Annotated[Path, typer.Argument(help="a folder, an image, or a .csv or .parquet list with a path column")]
Store = Annotated[Path, typer.Argument(help="a folder that repkit extract wrote")]
Model = Annotated[str, typer.Option("--model", "-m", help="name of repkit models, folder, file, hub id, or timm:NAME")]
Taps = Annotated[list[str] | None, typer.Option("--taps", "-t", help="BLOCKS@TIMES, e.g. 'mid,up.*@10,50'; repeatable")]
Size = Annotated[int | None, typer.Option(min=1, help="side in pixels; default: the model's own")]
Config = Annotated[list[str] | None, typer.Option(help="KEY=VALUE that the weights of a file do not tell; repeatable")]
Lora = Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE, merged into weights; repeatable")]
Denoiser = Annotated[str | None, typer.Option(help="other weights: file, folder or owner/name[@commit]")]
Vae = Annotated[str | None, typer.Option(help="another autoencoder: folder or owner/name[@commit]")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Seed = Annotated[int, typer.Option(help="seed of the noise")]
Preset = Annotated[str | None, typer.Option(help="published method of repkit presets, in place of -m and -t")]
PresetModel = Annotated[
    str | None, typer.Option("--model", "-m", help="as in extract; with --preset, its diffusion model")
]
Dino = Annotated[str | None, typer.Option(help="timm model of the DINO part, or of one beside -m")]
DinoTaps = Annotated[list[str] | None, typer.Option(help="taps of the DINO part, e.g. block.9; repeatable")]
Label = Annotated[str | None, typer.Option(help="what the images show, for {label} in the prompt")]
Prompt = Annotated[str | None, typer.Option(help="what the network is told; may use {label}")]
PairPolicy = Annotated[Literal["squash", "pad"] | None, typer.Option("--resize", help="for images of another shape")]
Draws = Annotated[int | None, typer.Option(min=1, help="average over so many noises")]
Weights = Annotated[str | None, typer.Option(help="of the parts of a fusion, such as 1,0.5")]
Offline = Annotated[bool, typer.Option("--offline", help="never ask the network")]
