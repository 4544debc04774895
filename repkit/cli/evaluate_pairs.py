"""Benchmarks of correspondence: points of one image are looked for in another."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repkit.cli.options import (
    Config,
    Denoiser,
    Json,
    Lora,
    Precision,
    Vae,
)
from repkit.cli.pairing import building, read_numbers
from repkit.cli.pck import print_results, tell_left_out
from repkit.cli.presets import say_parts
from repkit.cli.printing import print_json, say
from repkit.cli.sharing import sharing

if TYPE_CHECKING:
    from repkit.datasets.pairs import Pair

Root = Annotated[Path, typer.Argument(help="folder of the benchmark as it is published")]
Search = Annotated[
    str | None, typer.Option(help="weights of the second part, e.g. 0,0.5,1,2,inf: the one best on val is used")
]
Pairs = Callable[[str, Sequence[str] | None], "list[Pair]"]


@sharing(building, first=True)
def _options(
    categories: Annotated[str | None, typer.Option(help="only these, e.g. cat,dog")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="only the first so many pairs of each category")] = None,
    alphas: Annotated[
        str, typer.Option(help="what an error may be, as fractions of the box or image")
    ] = "0.1,0.05,0.01",
    remove_position: Annotated[
        bool, typer.Option("--remove-position", help="take off what features have at a place in any image")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder of the results; else BENCHMARK-NAME")] = None,
    dtype: Annotated[Precision, typer.Option(help="of the stored features")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    retry: Annotated[bool, typer.Option("--retry", help="try images again that failed before")] = False,
    revision: Annotated[str | None, typer.Option(help="commit of a hub model")] = None,
    lora: Lora = None,
    denoiser: Denoiser = None,
    vae: Vae = None,
    config: Config = None,
    prompt_cache: Annotated[str | None, typer.Option(help="folder that keeps encoded prompts")] = None,
    as_json: Json = False,
    *,
    shared: dict[str, Any],
) -> dict[str, Any]:
    return dict(locals())


@sharing(_options)
def spair(
    root: Root,
    split: Annotated[Literal["trn", "val", "test"], typer.Option(help="which pairs")] = "test",
    search_weights: Search = None,
    *,
    shared: dict[str, Any],
) -> None:
    """Find points in other images: keypoints of SPair-71k.

    Every image is encoded once, and PCK is reported by every published protocol. Kill it at any time: the same command
    goes on where it stopped.
    """
    from repkit.datasets.keypoint_mirrors import PAIRS, partner
    from repkit.datasets.spair import read_spair

    def partners(pair: "Pair") -> list[int | None] | None:
        return partner(pair.category, pair.names) if pair.category in PAIRS else None

    def read(split: str, categories: Sequence[str] | None) -> "list[Pair]":
        return read_spair(root, split, categories=categories)

    _evaluate("spair", read, shared, split, search_weights, partner=partners)


@sharing(_options)
def pf_pascal(
    root: Root,
    split: Annotated[Literal["trn", "val", "test"], typer.Option(help="which pairs")] = "test",
    search_weights: Search = None,
    *,
    shared: dict[str, Any],
) -> None:
    """Find points in other images: keypoints of PF-Pascal.

    Every image is encoded once, and PCK is reported by every published protocol. Kill it at any time: the same command
    goes on where it stopped.
    """
    from repkit.datasets.proposal_flow import read_pf_pascal

    def read(split: str, categories: Sequence[str] | None) -> "list[Pair]":
        return read_pf_pascal(root, split, categories=categories)

    _evaluate("pf-pascal", read, shared, split, search_weights, threshold="image")


@sharing(_options)
def pf_willow(root: Root, *, shared: dict[str, Any]) -> None:
    """Find points in other images: keypoints of PF-Willow.

    Every image is encoded once, and PCK is reported by every published protocol. Kill it at any time: the same command
    goes on where it stopped.
    """
    from repkit.datasets.proposal_flow import read_pf_willow

    _evaluate("pf-willow", lambda _, categories: read_pf_willow(root, categories=categories), shared)


@sharing(_options)
def tss(
    root: Root,
    step: Annotated[int, typer.Option(min=1, help="of the known pixels every so many; 1 is all, as published")] = 4,
    *,
    shared: dict[str, Any],
) -> None:
    """Find points in other images: pixels of TSS.

    Every image is encoded once, and PCK is reported by every published protocol. Kill it at any time: the same command
    goes on where it stopped.
    """
    from repkit.datasets.tss import read_tss

    def read(split: str, categories: Sequence[str] | None) -> "list[Pair]":
        return read_tss(root, categories=categories)

    # Papers count flows in the original image, whatever their protocol for keypoints is.
    _evaluate("tss", read, shared, threshold="image", protocol="dift", step=step)


@sharing(_options)
def pairs(
    root: Annotated[Path, typer.Argument(help="a .csv list, or a folder with pairs.csv")], *, shared: dict[str, Any]
) -> None:
    """Find points in other images: pairs of your own.

    The list has a row a point: source, target, x1, y1, x2, y2, and where wanted name and category. Every image is
    encoded once, and PCK is reported by every published protocol. Kill it at any time: the same command goes on where
    it stopped.
    """
    from repkit.datasets.pairs import chosen, read_pairs

    _evaluate("pairs", lambda _, categories: chosen(read_pairs(root), categories), shared, threshold="image")


def _evaluate(
    benchmark: str,
    read: Pairs,
    given: dict[str, Any],
    split: str = "",
    search: str | None = None,
    **rules: Any,
) -> None:
    """Read the pairs, build what matches them, and evaluate; given: the shared options."""
    built = given["shared"]
    if search is not None and split == "val":
        raise ValueError("--search-weights chooses the weight on val; give --split test, or --weights for val alone")

    from repkit.progress import Progress
    from repkit.tasks.evaluate_pairs import RESULTS, Rules, Running, evaluate_pairs, search_weights
    from repkit.tasks.pair_pictures import draw_pairs
    from repkit.tasks.pair_table import MATCHES

    categories = None if given["categories"] is None else [one.strip() for one in given["categories"].split(",")]
    alphas = tuple(read_numbers("--alphas", given["alphas"]))
    weights = None if search is None else read_numbers("--search-weights", search)
    pairs = _first(read(split, categories), given["most"])
    say(f"{len(pairs)} pairs of {len({path for pair in pairs for path in (pair.source, pair.target)})} images")
    preset, correspondence = _build(given, pairs)
    say_parts(preset)
    used = Rules(
        **{"protocol": preset.protocol, "alphas": alphas, "dtype": given["dtype"]} | rules,
        remove_position=given["remove_position"],
    )
    running = Running(given["batch_size"], built["device"], given["retry"], Progress)
    folder = given["out"] or Path(f"{benchmark}-{built['preset'] or Path(built['model'] or built['dino']).name}")
    told = {"benchmark": benchmark, "split": split or None, "preset": preset.name, "differs": list(preset.differs)}
    told["models"] = [part.extractor.provenance.get("model") for part in correspondence.parts]
    told |= {"most": given["most"], "step": used.step if benchmark == "tss" else None}
    if weights is not None:
        val = _first(read("val", categories), given["most"])
        correspondence, scores = search_weights(val, correspondence, folder, weights, used, running)
        told["searched_weights"] = scores
    told["weights"] = [float(part.weight) for part in correspondence.parts]
    results = evaluate_pairs(pairs, correspondence, folder, used, running, told=told)
    if results["pairs"]:
        draw_pairs(results, folder)
    if given["as_json"]:
        print_json({**results, "out": str(folder)})
    elif results["pairs"]:
        print_results(results)
        print(f"\neverything: {folder / RESULTS}; every match: {folder / MATCHES}; pictures: best.png, worst.png there")
    tell_left_out(results)


def _build(given: dict[str, Any], pairs: "Sequence[Pair]") -> Any:
    """The preset and the correspondence; says where a prompt cannot be filled."""
    from repkit.tasks.building import read_config, read_lora
    from repkit.tasks.presets import make_correspondence

    options = given["shared"] | {name: given[name] for name in ("revision", "denoiser", "vae", "prompt_cache")}
    options["lora"] = [read_lora(one) for one in given["lora"] or []]
    options["config"] = read_config(given["config"] or [])
    preset, correspondence = make_correspondence(**options)
    labelled = [cond for cond in correspondence.conds if cond is not None and "{label}" in cond]
    if labelled and all(pair.category is None for pair in pairs):
        say(f"the pairs have no categories, so the network is told nothing instead of {labelled[0]!r}")
    return preset, correspondence


def _first(pairs: "list[Pair]", most: int | None) -> "list[Pair]":
    """The first pairs of each category, all without a limit."""
    if most is None:
        return pairs
    groups = groupby(sorted(pairs, key=lambda pair: pair.category or ""), key=lambda pair: pair.category)
    return [pair for _, group in groups for pair in list(group)[:most]]
