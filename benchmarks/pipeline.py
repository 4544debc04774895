"""What an export adds to the bare model: `python benchmarks/pipeline.py` measures it and writes docs/BENCHMARKS.md.

On a bundled model and PNG files of Fashion-MNIST, as ratios within one run: an export over a loop of nothing but the
truncated forward, and over the loop that is commonly written; and the share of checksums, fsync and rename. Files are
synced once a shard, so fewer `--images` than fill one (1,024) show a larger share than a long export has.
"""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from forward import TIME, Images, ready
from measuring import PAGE, machine, ratio, spread, table, take_turns, write_section
from PIL import Image

from repkit.backbones.base import Backbone
from repkit.datasets import fashion_mnist
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor, prepare
from repkit.images import Resize
from repkit.zoo import load

# (block, pooling) of each export: the deeper the block, the more the model does for an image.
EXPORTS = (("up.0", "mean"), ("up.0", "none"), ("mid", "mean"), ("down.0", "mean"))
SCRIPT, FEWER = "up.0", 8  # the common script goes to this block, with this many times fewer images: it is that slow
DURABLE = ("sha256", "fsync", "replace")

Seconds = Sequence[float]


@dataclass(frozen=True)
class Setting:
    """What every measurement works on: the files, and the same images decoded."""

    backbone: Backbone
    root: Path
    paths: Sequence[Path]
    images: Images
    batch: int
    rounds: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-unet", help="a bundled U-Net")
    parser.add_argument("--images", type=int, default=1000, help="files of an export")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder, torch.no_grad():
        setting = make_setting(load(options.model), Path(folder), options.images, options.batch, options.rounds)
        figures = measure(setting)
    about = (
        f"`python benchmarks/pipeline.py`: {options.model}, {options.images} PNG files of 28x28 pixels, "
        f"batches of {options.batch}, {options.rounds} rounds."
    )
    body = f"{about}\n\n{machine()}\n\n{figures}"
    print(body)
    write_section(options.page, "Pipeline", body)


def make_setting(backbone: Backbone, root: Path, images: int, batch: int, rounds: int) -> Setting:
    """Write the files, and decode them as an export does."""
    classes = len(fashion_mnist.CLASSES)
    written = fashion_mnist.write_folder(root / "images", "test", -(-images // classes))
    paths = sorted(written.rglob("*.png"))[:images]
    decoded = prepare(paths, Resize(backbone.size), backbone.device).images
    return Setting(backbone, root, paths, decoded, batch, rounds)


def measure(setting: Setting) -> str:
    """Both tables, with what they mean."""
    speeds, shares = [], []
    for block in dict.fromkeys(block for block, _ in EXPORTS):
        pools = [pool for name, pool in EXPORTS if name == block]
        spent: dict[str, list[dict[str, float]]] = {pool: [] for pool in pools}
        exports = {pool: timed_export(setting, block, pool, spent[pool]) for pool in pools}
        actions: dict[str, Callable[[], object]] = {"bare": bare_loop(setting, block), **exports}
        if block == SCRIPT:
            actions["script"] = partial(common_script, setting)
        seconds = take_turns(actions, setting.rounds)
        speeds += speed_rows(block, len(setting.paths), seconds)
        shares += [share_row(f"`{block}`, pool {pool}", spent[pool][1:], seconds[pool]) for pool in pools]
    return f"""From files to a store, over a loop of the forward that ends at the tap, on inputs that are decoded and
noised already. The common script opens one image at a time, runs the whole network with a hook, and saves an array for
each.

{table(("", "images/s", "over the bare forward", "aim"), speeds)}

Seconds within sha256 (of files, images, noise keys and shards), fsync and rename, over those of the export. Most pass
in the threads that decode and write, beside the forward.

{table(("share of an export", "sha256", "fsync", "rename", "together", "aim"), shares)}"""


def bare_loop(setting: Setting, block: str) -> Callable[[], None]:
    """The forward up to `block` over every batch, and nothing else."""
    inputs = [ready(setting.backbone, images) for images in setting.images.split(setting.batch)]

    def run() -> None:
        for x_t, condition in inputs:
            setting.backbone.activations(x_t, TIME, condition, [block])

    return run


def timed_export(setting: Setting, block: str, pool: str, spent: list[dict[str, float]]) -> Callable[[], None]:
    """An export into a new folder at each call, which adds to `spent` the seconds within what makes it durable."""
    extract = DiffusionExtractor(setting.backbone, [f"{block}@{TIME}"])
    folders = (setting.root / f"{block}-{pool}-{number}" for number in count())

    def run() -> None:
        with stopwatches((hashlib, "sha256"), (os, "fsync"), (os, "replace")) as seconds:
            export(setting.paths, extract, next(folders), pool=pool, batch_size=setting.batch)
        spent.append({name: sum(taken) for name, taken in seconds.items()})

    return run


@contextmanager
def stopwatches(*functions: tuple[Any, str]) -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of the functions, given as (module, name), in whatever thread."""
    seconds: dict[str, list[float]] = {name: [] for _, name in functions}

    def timed(function: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            started = perf_counter()
            try:
                return function(*values, **named)
            finally:
                taken.append(perf_counter() - started)

        return call

    with ExitStack() as stack:
        for module, name in functions:
            stack.enter_context(patch.object(module, name, timed(getattr(module, name), seconds[name])))
        yield seconds


def common_script(setting: Setting) -> None:
    """What is commonly written: one image at a time, the whole network with a hook, a file for each image."""
    backbone, kept = setting.backbone, []
    module = backbone.model.get_submodule(backbone.point(SCRIPT).path)
    hook = module.register_forward_hook(lambda module, args, output: kept.append(output))
    for path in setting.paths[::FEWER]:
        picture = Image.open(path).convert("RGB").resize((backbone.size, backbone.size), Image.Resampling.BICUBIC)
        x0 = backbone.encode(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255)
        x_t = backbone.schedule.add_noise(x0, torch.randn_like(x0), TIME)
        backbone.denoise(x_t, TIME, backbone.condition(None, 1))
        np.save(setting.root / f"{path.stem}.npy", kept.pop().mean((-2, -1)).numpy())
    hook.remove()


def speed_rows(block: str, images: int, seconds: Mapping[str, Seconds]) -> list[tuple[str, ...]]:
    """Images a second of each action, and how that compares with the bare forward."""
    rows: list[tuple[str, ...]] = []
    for name, taken in seconds.items():
        count = len(range(0, images, FEWER)) if name == "script" else images
        over = "1" if name == "bare" else f"{ratio(seconds['bare'], taken, count / images):.3f}"
        label = {"bare": "bare forward", "script": "common script"}.get(name, f"export, pool {name}")
        aim = "" if name in ("bare", "script") else ">= 0.95"
        rows.append((f"`{block}`: {label}", f"{spread([count / one for one in taken]).median:.0f}", over, aim))
    return rows


def share_row(label: str, spent: Sequence[Mapping[str, float]], seconds: Seconds) -> tuple[str, ...]:
    """The share of an export's seconds that each kind of call takes, and all of them."""
    each = [ratio([one[name] for one in spent], seconds).median for name in DURABLE]
    together = ratio([sum(one.values()) for one in spent], seconds)
    return (label, *(f"{share:.2%}" for share in each), f"{together:.2%}", "<= 1 %")


if __name__ == "__main__":
    main()
