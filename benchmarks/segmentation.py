"""How well features segment: `python benchmarks/segmentation.py` measures it on masks that are known.

Two sets of pictures, of the bundled test images of Fashion-MNIST: clothes on black, each pixel to be given the kind of
clothing that it is of, or none; and clothes on textures (scikit-image's brick, grass, gravel), to be told from these.
Features of the bundled models, of untrained copies of them and raw colours: linear, pixel-classifier and pyramid heads
learn from a few masks; normalised cuts, k-means and merged attention from none. The section `Segmentation` of
docs/RESULTS.md has the tables. `--images`, `--masks`, `--seeds`, `--models` and `--size` make it smaller.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from measuring import table, write_section
from PIL import Image

from repkit.backbones.base import Backbone, Block
from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor, Extractor, prepare, resize_identity
from repkit.features import Features
from repkit.heads.dense_training import DenseRule
from repkit.heads.pixel_training import PixelRule
from repkit.images import Resize
from repkit.listing import list_images
from repkit.tasks.mask_files import Labels
from repkit.tasks.segment import segment
from repkit.tasks.segment_method import Method
from repkit.tasks.segment_scores import report
from repkit.tasks.segment_source import Maps, Pictures, Size, Source
from repkit.tasks.segment_supervised import Linear, Pixels, Pyramid
from repkit.tasks.segment_truth import Truth, read_labels
from repkit.tasks.segment_unsupervised import Attention, Kmeans, Ncut
from repkit.zoo import load, random_control

ROOT = Path(__file__).parent.parent
TEXTURES = ("brick.png", "grass.png", "gravel.png")
SIDE = 64  # of the pictures
KINDS = fashion_mnist.CLASSES
TAUS, THRESHOLDS = (0.2, 0.4, 0.6, 0.8), (0.05, 0.1, 0.2, 0.4)  # of cuts and of merged attention
BLOCKS = {"mini-unet": "down.*,mid,up.*", "mini-dit": "block.*"}
MAPS = {"mini-unet": "up.0.attn.*.self.map", "mini-dit": "block.*.attn.map"}
TIME = 50
MATCHED = {"kmeans": "matched per data set"}  # whose clusters are those of all pictures
Picture = UInt8[np.ndarray, "H W"]


@dataclass(frozen=True)
class Scene:
    """One set of pictures: where it is, its classes, the size that networks see of it, and how many are for learning.

    Of the first pictures, `masks` are for each of the seeds; the others are scored.
    """

    name: str
    root: Path
    masks: int
    seeds: int
    size: int
    classes: tuple[str, ...]

    @property
    def few(self) -> int:
        return self.masks * self.seeds

    @cached_property
    def labels(self) -> Labels:
        """Those of all masks of the set."""
        return read_labels(sorted((self.root / "masks").iterdir()), ignore=-1)

    def truth(self, rows: Sequence[int]) -> Truth:
        """The masks of some pictures."""
        return Truth(self.root / "masks", self.labels, list(rows))


class Colours(Extractor):
    """The pixels' own colours, as three channels."""

    provenance: Mapping[str, Any] = {}

    def __init__(self, size: int) -> None:
        self.resize, self.blocks = Resize(size, "squash"), {"rgb": Block(3, 1)}

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        return {"rgb": (3, *self.resize.shape)}

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"extractor": "colours", "resize": self.resize.identity}

    def __call__(self, images: Any, cond: Any = None, *, grad: bool = False, check: bool = True) -> Features:
        batch = prepare(images, self.resize, torch.device("cpu"))
        height, width = batch.images.shape[-2:]
        identity = {**self.identity, "resize": resize_identity(self.resize, height, width)}
        return Features({"rgb": batch.images}, (height, width), batch.mask, identity)


class Remembered(Source):
    """Some rows of a source that looks at each image once: the same maps serve every head."""

    def __init__(self, source: Source, rows: Sequence[int], held: dict[int, tuple[Maps, Size]]) -> None:
        self.source, self.rows, self.held = source, rows, held
        self.listing, self.resize = source.listing.take(rows), source.resize
        self.strides, self.shapes, self.identity = source.strides, source.shapes, source.identity

    def maps(self, row: int) -> tuple[Maps, Size]:
        row = self.rows[row]
        if row not in self.held:
            self.held[row] = self.source.maps(row)
        return self.held[row]


class Seen:
    """A set's pictures through an extractor; `only` is some of them."""

    def __init__(self, scene: Scene, extractor: Extractor) -> None:
        self.source = Pictures(list_images(scene.root / "images"), extractor)
        self.held: dict[int, tuple[Maps, Size]] = {}

    def only(self, rows: Sequence[int]) -> Source:
        return Remembered(self.source, rows, self.held)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="pictures that are scored, of each set")
    parser.add_argument(
        "--masks", type=int, default=5, help="to learn from for each seed: on textures, and of each kind"
    )
    parser.add_argument("--seeds", type=int, default=3, help="choices of these, and seeds of the heads")
    parser.add_argument("--choosing", type=int, default=20, help="of those to learn from, that settings are chosen on")
    parser.add_argument("--steps", type=int, default=1000, help="of training of every head, at most")
    parser.add_argument("--models", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--size", type=int, default=SIDE, help="that mini-unet sees of the textures; mini-dit sees 32")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args(arguments)
    parts = []
    with TemporaryDirectory() as folder:
        for scene in scenes(Path(folder), options):
            found = measure(scene, extractors(options.models, scene.size), options)
            parts.append(f"{scene.name}:\n\n{scores_table(found)}")
    body = section(parts, options)
    print(body)
    write_section(options.page, "Segmentation", body)


def scenes(folder: Path, options: argparse.Namespace) -> Iterator[Scene]:
    """Both sets, written when they are asked for."""
    kinds = Scene("Clothes by kind", folder / "kinds", options.masks * len(KINDS), options.seeds, 32, ("none", *KINDS))
    write_kinds(kinds.root, kinds.few + options.images)
    yield kinds
    placed = Scene(
        "Clothes on textures", folder / "placed", options.masks, options.seeds, options.size, ("ground", "clothes")
    )
    write_placed(placed.root, placed.few + options.images)
    yield placed


def write_kinds(root: Path, count: int) -> None:
    """Pictures images/0000.png ..., the kinds in turn, and masks/0000.png: 0 for black, else 1 more than the kind."""
    pictures, labels = fashion_mnist.load("test")
    rows = [np.flatnonzero(labels == kind) for kind in range(len(KINDS))]
    for number in range(count):
        turn, kind = divmod(number, len(KINDS))
        picture = pictures[rows[kind][turn]]
        _write(root, number, picture, np.where(picture > 0, kind + 1, 0))


def write_placed(root: Path, count: int) -> None:
    """Pictures images/0000.png ... of clothes on textures, and masks/0000.png: 1 on the clothes."""
    clothes, textures = fashion_mnist.load("test")[0], [_grey(name) for name in TEXTURES]
    for number in range(count):
        rng = np.random.default_rng(number)
        cloth, inside = _placed(clothes[number], rng)
        around = _crop(textures[rng.integers(len(textures))], rng)
        _write(root, number, np.where(inside, cloth, around), inside)


def _write(root: Path, number: int, picture: np.ndarray, mask: np.ndarray) -> None:
    for folder, values in (("images", picture), ("masks", mask)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(root / folder / f"{number:04}.png")


def _grey(name: str) -> Picture:
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    return np.asarray(Image.open(path).convert("L"))


def _placed(cloth: Picture, rng: np.random.Generator) -> tuple[Picture, np.ndarray]:
    """One piece of clothing, enlarged, somewhere on a black picture; and where it is."""
    side = int(rng.integers(SIDE // 2, SIDE * 7 // 8))
    large = np.asarray(Image.fromarray(cloth).resize((side, side), Image.Resampling.BICUBIC))
    x, y = rng.integers(0, SIDE - side + 1, 2)
    picture = np.zeros((SIDE, SIDE), np.uint8)
    picture[y : y + side, x : x + side] = large
    return picture, picture > 20


def _crop(texture: Picture, rng: np.random.Generator) -> Picture:
    """A square of a texture, all of the same mean and spread."""
    height, width = texture.shape
    side = int(rng.integers(SIDE, 3 * SIDE))
    y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    square = Image.fromarray(texture[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(square).astype(np.float64)
    return (128 + 40 * (values - values.mean()) / values.std()).clip(0, 255).round().astype(np.uint8)


def measure(
    scene: Scene, seen: Sequence[tuple[str, Extractor, Extractor | None]], options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """For each kind of feature and each head, mIoU in percent of every seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, extractor, attention in seen:
        pictures = Seen(scene, extractor)
        scores = {
            head: [scored(scene, pictures, make(seed), seed) for seed in range(options.seeds)]
            for head, make in heads(options.steps).items()
        }
        scores["kmeans"] = [scored(scene, pictures, Kmeans(len(scene.classes)))]
        if attention is not None:  # pictures in grey have colours of one direction only, so cuts are for networks
            scores["ncut"] = [chosen(scene, pictures, [Ncut(tau) for tau in TAUS], options.choosing)]
            settings = [Attention(threshold) for threshold in THRESHOLDS]
            scores["attention"] = [chosen(scene, Seen(scene, attention), settings, options.choosing)]
        found[name] = scores
        print(f"{scene.name}, {name}: {scores}", flush=True)
    return found


def chosen(scene: Scene, seen: Seen, methods: Sequence[Method], count: int) -> float:
    """The score of the setting that is best on the first `count` of the pictures that heads learn from."""
    rows = range(min(count, scene.few))
    return scored(scene, seen, max(methods, key=lambda method: scored(scene, seen, method, rows=rows)))


def extractors(models: Sequence[str], size: int) -> list[tuple[str, Extractor, Extractor | None]]:
    """Colours, and each network with the taps of its blocks and those of its self-attention."""
    found: list[tuple[str, Extractor, Extractor | None]] = [("colours", Colours(size), None)]
    for name in models:
        trained, untrained = networks(name)
        side = size if name == "mini-unet" else trained.size  # mini-dit takes no other
        for words, backbone in (("", trained), (", untrained", untrained)):
            maps = _seen(backbone, MAPS[name], side)
            found.append((f"{name}{words}, {side} px", _seen(backbone, BLOCKS[name], side), maps))
    return found


@cache
def networks(name: str) -> tuple[Backbone, Backbone]:
    """A bundled model, and an untrained copy of it."""
    trained = load(name)
    return trained, random_control(trained)


def _seen(backbone: Backbone, blocks: str, size: int) -> DiffusionExtractor:
    return DiffusionExtractor(backbone, f"{blocks}@{TIME}", resize=Resize(size, "squash"))


def heads(steps: int) -> dict[str, Callable[[int], Method]]:
    """Those that learn from masks, by a seed."""
    dense, pixels = DenseRule(steps=steps), PixelRule(steps=steps)
    return {
        "linear": lambda seed: Linear(dense, seed=seed),
        "mlp": lambda seed: Pixels(pixels, seed=seed),
        "fpn": lambda seed: Pyramid(dense, seed=seed, width=32),
    }


def scored(scene: Scene, seen: Seen, method: Method, seed: int = 0, rows: Sequence[int] | None = None) -> float:
    """mIoU in percent over the pictures that no seed learns from, or over `rows`."""
    few = range(seed * scene.masks, (seed + 1) * scene.masks) if method.supervised else range(0)
    tested = range(scene.few, len(seen.source.ids)) if rows is None else rows
    source = seen.only([*few, *tested])
    train, test = range(len(few)), range(len(few), len(few) + len(tested))
    with TemporaryDirectory() as out:
        found = segment(source, method, Path(out) / "out", truth=scene.truth(train))
        told = report(source, found, method.settings, scene.classes, scene.truth(test))
    name = "data set" if method.supervised else MATCHED.get(method.name, "matched per image")
    return 100 * float(told["scores"][name]["mIoU"])


def scores_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One set's table."""
    columns = ["linear", "mlp", "fpn", "kmeans", "ncut", "attention"]
    rows = [[features, *(_cell(scores.get(head)) for head in columns)] for features, scores in found.items()]
    return table(["features", *columns], rows)


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def section(parts: Sequence[str], options: argparse.Namespace) -> str:
    """The tables, with what they mean."""
    tables = "\n\n".join(parts)
    return f"""Made by `python benchmarks/segmentation.py`: pictures made of bundled test images of Fashion-MNIST,
{options.images} in each of two sets. By kind: each pixel of an image is of one of ten kinds of clothes, or black. On
textures: clothes somewhere on a texture of scikit-image ({SIDE} pixels), which are to be told apart. mIoU in percent
over all pixels of a set. linear, mlp (10 pixel classifiers, majority vote) and fpn learned from a few other pictures
with masks ({options.masks} of each kind, {options.masks} on textures), at most {options.steps} steps: mean and standard
deviation over {options.seeds} choices of these. kmeans has as many clusters as there are classes, matched to them once
for the set. ncut and attention look at one picture at a time, and their clusters are matched in each picture anew, so
they are told which kind is in it; what they merge by was chosen on pictures that others learned from. Features are
those of all blocks at t = {TIME}; untrained networks have random weights. The bundled models have only seen clothes on
black, of 32 pixels.

{tables}"""


if __name__ == "__main__":
    main()
