"""What matching costs: `python benchmarks/matching.py` measures it and writes docs/BENCHMARKS.md.

On random maps of the sizes that papers use, as ratios within one run: cells against a plain matrix product with
normalised features and its argmax, which is the limit; pixels against upsampling the target's features to the image's
size; and the most memory that either takes beside its input. And a whole evaluation of all pairs of some images, with
its stores and tables, against encoding both images of each pair.
"""

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from measuring import PAGE, machine, ratio, table, take_turns, write_section
from torch import Tensor

from repkit.datasets import fashion_mnist
from repkit.datasets.pairs import Pair, checked
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Part
from repkit.images import Resize
from repkit.matching.featuremap import FeatureMap, cell_centres
from repkit.matching.nearest import nearest
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.evaluate_pairs import evaluate_pairs
from repkit.zoo import load

TAP = "up.1@50"


@dataclass(frozen=True)
class Case:
    """Two maps of `channels` on a square grid of images of `size` pixels, and how many points are matched."""

    name: str
    channels: int
    grid: int
    size: int
    points: int


CELLS = (Case("20 keypoints, DIFT's map", 1280, 48, 768, 20), Case("all cells, sd-dino's map", 1536, 60, 840, 3600))
PIXELS = (Case("20 keypoints, DIFT's map", 1280, 48, 500, 20),)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=16, help="of the evaluation, all in pairs")
    parser.add_argument("--shrink", type=int, default=1, help="channels, grids and images that many times smaller")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        body = f"""`python benchmarks/matching.py`: random maps, {options.rounds} rounds.

{machine()}

Over the plain way: for cells, both maps normalised, one matrix product and its argmax; for pixels, the target's
features upsampled to the image's size, normalised, multiplied and searched. Memory is the most that is taken beside the
maps.

{measure(CELLS, PIXELS, options.rounds, options.shrink)}

{evaluations(options.images, options.rounds)}"""
    print(body)
    write_section(options.page, "Matching", body)


def measure(cells: Sequence[Case], pixels: Sequence[Case], rounds: int, shrink: int) -> str:
    """A row a case: matches a second, time over the plain way, and the memory of both."""
    rows = []
    for exact, cases in ((False, cells), (True, pixels)):
        for case in cases:
            source, target, points = make(case, shrink)
            plain = upsampled if exact else product
            actions: dict[str, Callable[[], object]] = {
                "plain": partial(plain, source, target, points),
                "ours": partial(nearest, source, target, points, exact=exact),
            }
            seconds = take_turns(actions, rounds)
            peak = {name: peak_bytes(action) / 1e6 for name, action in actions.items()}
            rate = ratio([float(len(points))] * rounds, seconds["ours"])
            rows.append(
                [f"{case.name}, {'pixels' if exact else 'cells'}", f"{rate:.0f}"]
                + [f"{ratio(seconds['ours'], seconds['plain']):.2f}"]
                + [f"{peak[name]:.0f}" for name in ("ours", "plain")]
            )
    return table(("", "matches/s", "time over the plain way", "MB", "MB, plain way"), rows)


def evaluations(images: int, rounds: int) -> str:
    """All ordered pairs of images, evaluated over encoding both images of each pair."""
    with TemporaryDirectory() as folder:
        root = fashion_mnist.write_folder(Path(folder) / "images", "test", -(-images // len(fashion_mnist.CLASSES)))
        paths = sorted(root.rglob("*.png"))[:images]
        points = np.stack(np.meshgrid([7.0, 13, 20], [7.0, 13, 20]), -1).reshape(-1, 2)
        pairs = checked(
            [
                Pair(f"{a.relative_to(root)}>{b.relative_to(root)}", a, b, points, points, ())
                for a, b in permutations(paths, 2)
            ],
            root,
        )
        extractor = DiffusionExtractor(load("mini-unet"), TAP, resize=Resize(64, "squash"))
        correspondence, out = Correspondence([Part(extractor)]), count()
        actions: dict[str, Callable[[], object]] = {
            "once": lambda: evaluate_pairs(pairs, correspondence, Path(folder) / f"out-{next(out)}"),
            "per pair": lambda: [
                correspondence.match(*correspondence.see([pair.source, pair.target]), torch.from_numpy(points).float())
                for pair in pairs
            ],
        }
        seconds = take_turns(actions, rounds)
    share = f"{ratio(seconds['once'], seconds['per pair']):.3f}"
    return f"""A whole evaluation (stores, matches, PCK) of {len(pairs)} pairs of {images} images, `{TAP}` of mini-unet
at 64 pixels, over encoding both images of each pair and matching: {share} of the time, for {images} instead of
{2 * len(pairs)} images encoded."""


def make(case: Case, shrink: int) -> tuple[FeatureMap, FeatureMap, Float[Tensor, "n 2"]]:
    """Random maps, and the first of the source's cells."""
    channels, grid, size = case.channels // shrink, max(2, case.grid // shrink), case.size // shrink
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(channels, grid, grid, generator=generator) for _ in range(2)]
    source, target = (FeatureMap(values, (size, size)) for values in maps)
    return source, target, cell_centres(source)[: case.points]


def product(source: FeatureMap, target: FeatureMap, points: Float[Tensor, "n 2"]) -> Int[Tensor, " n"]:
    """The limit: descriptors taken as they lie, one matrix product, its argmax."""
    queries = F.normalize(rearrange(source.values, "c h w -> (h w) c")[: len(points)])
    keys = F.normalize(rearrange(target.values, "c h w -> c (h w)"), dim=0)
    return (queries @ keys).argmax(1)


def upsampled(source: FeatureMap, target: FeatureMap, points: Float[Tensor, "n 2"]) -> Int[Tensor, " n"]:
    """The common script: both maps at the images' size, the target's normalised as a whole."""
    grown = [F.interpolate(one.values[None], one.size, mode="bilinear")[0] for one in (source, target)]
    x, y = points.round().long().T
    queries = F.normalize(grown[0][:, y, x].T)
    return (queries @ F.normalize(rearrange(grown[1], "c h w -> c (h w)"), dim=0)).argmax(1)


def peak_bytes(action: Callable[[], object]) -> int:
    """How much more memory a process has at the most while it acts, in one that is forked for it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(action, sender))
    child.start()
    found = receiver.recv()
    child.join()
    return found


def _report_peak(action: Callable[[], object], sender: "multiprocessing.connection.Connection") -> None:
    torch.set_num_threads(1)  # threads of the parent are not there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


if __name__ == "__main__":
    main()
