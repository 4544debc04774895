"""How well features find points again: `python benchmarks/correspondence.py` measures it against known maps.

Four photographs of scikit-image under homographies, thin-plate splines, crops and flips, whose true correspondences
are exact. Features of the bundled models at several sizes, of untrained copies, of a vision transformer with random
weights, raw patches and random features: for each the tap is chosen on other deformations of the same photographs. The
section `Correspondence` of docs/RESULTS.md has the table, docs/correspondence.png shows some of it. `--images`,
`--repeats` and `--sizes` make it smaller.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from measuring import table, write_section
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.datasets.pairs import Pair, Size, read_pairs
from repkit.datasets.warps import KINDS, write_warps
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.heads.pck import Pck, pck
from repkit.images import Resize, decode, to_tensor
from repkit.matching.featuremap import FeatureMap
from repkit.matching.nearest import nearest
from repkit.matching.positions import position_component, same_position, without_position
from repkit.zoo import load, random_control

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
SIDE, ALPHAS = 256, (0.1, 0.05, 0.02)
TIMES = "10,50,100,200,clean:50"
CHOOSING = ("homography", "thin-plate", "crop")  # the deformations that taps are chosen on
PICTURE = "correspondence.png"
GRID = 64  # of patches and random features

Maps = Mapping[str, Float[Tensor, "_c _h _w"]]  # of an image, by tap
Points = Float[np.ndarray, "_n 2"]
Scores = tuple[str, Pck]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=len(PHOTOGRAPHS), help="photographs, at most 4")
    parser.add_argument("--repeats", type=int, default=3, help="deformations of each kind and photograph")
    parser.add_argument("--points", type=int, default=10, help="rows and columns of points")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="of the images networks see")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        photographs = [photograph_folder() / name for name in PHOTOGRAPHS[: options.images]]
        settings: dict[str, Any] = {"points": options.points, "size": SIDE}
        others = write_warps(photographs, f"{folder}/validation", kinds=CHOOSING, seed=1, **settings)
        warps = write_warps(photographs, f"{folder}/test", repeats=options.repeats, **settings)
        validation, test = read_pairs(others), read_pairs(warps)
        found = measure(validation, test, options.sizes)
        draw(test, found, options.sizes[-1], options.page.parent / PICTURE)
    body = section(found, test)
    print(body)
    write_section(options.page, "Correspondence", body)


def photograph_folder() -> Path:
    """Where scikit-image keeps what comes with it; its loaders may ask the network."""
    import skimage

    return Path(skimage.__file__).parent / "data"


def measure(validation: Sequence[Pair], test: Sequence[Pair], sizes: Sequence[int]) -> dict[str, Scores]:
    """For each kind of feature the tap that was best on the validation pairs, and its scores on the test pairs."""
    found: dict[str, Scores] = {"same position": ("", score(test, [stayed(pair) for pair in test]))}
    for name, make in {"random features": random_maps, "raw patches of 5x5 pixels": patch_maps}.items():
        found[name] = ("", score(test, predictions(test, make)[""]))
    for name, extractor in extractors(sizes):
        see = partial(maps_of, extractor)
        chosen = best(validation, predictions(validation, see))
        found[name] = (chosen, score(test, predictions(test, see, chosen)[chosen]))
        if "untrained" not in name:
            bare = partial(without, see, chosen, positions(validation, see, chosen))
            found[f"{name}, positions removed"] = (chosen, score(test, predictions(test, bare)[chosen]))
        print(f"{name}: {chosen} {percent(found[name][1].averages['image'][1])} at {ALPHAS[1]}", flush=True)
    return found


def extractors(sizes: Sequence[int]) -> list[tuple[str, Extractor]]:
    """Every network at every size that it takes."""
    found: list[tuple[str, Extractor]] = []
    unet, dit = load("mini-unet"), load("mini-dit")
    for name, backbone in (("mini-unet", unet), ("mini-unet, untrained", random_control(unet))):
        found += [(f"{name}, {size} px", diffusion(backbone, "down.*,mid,up.*", size)) for size in sizes]
    for name, backbone in (("mini-dit", dit), ("mini-dit, untrained", random_control(dit))):
        found.append((f"{name}, {dit.size} px", diffusion(backbone, "block.*", dit.size)))  # it takes no other size
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch8_224", num_classes=0, dynamic_img_size=True).eval().requires_grad_(False)
    taps = "block.0,block.3,block.7,block.11"
    found += [
        (f"ViT-S/8, untrained, {size} px", DinoExtractor(vit, taps, resize=Resize(size, "squash"))) for size in sizes
    ]
    return found


def diffusion(backbone: Backbone, blocks: str, size: int) -> DiffusionExtractor:
    """Every block at every time, of images squashed to a square."""
    return DiffusionExtractor(backbone, f"{blocks}@{TIMES}", resize=Resize(size, "squash"))


def maps_of(extractor: Extractor, path: Path) -> Maps:
    """One image's maps by tap."""
    features = extractor([path])
    return {key: features[key][0] for key in features}


def positions(pairs: Sequence[Pair], see: Callable[[Path], Maps], tap: str) -> Float[Tensor, "c h w"]:
    """What the tap has at each position whatever the image: the mean over all images of the pairs."""
    images = dict.fromkeys(path for pair in pairs for path in (pair.source, pair.target))
    return position_component(see(path)[tap][None] for path in images)


def without(see: Callable[[Path], Maps], tap: str, component: Float[Tensor, "c h w"], path: Path) -> Maps:
    """One image's map less what is at each position of any."""
    return {tap: without_position(see(path)[tap], component)}


def random_maps(path: Path) -> Maps:
    """Noise that is another for every image: what chance is worth."""
    generator = torch.Generator().manual_seed(int.from_bytes(path.stem.encode()[-7:], "big"))
    return {"": torch.randn(64, GRID, GRID, generator=generator)}


def patch_maps(path: Path) -> Maps:
    """The colours around every cell, less their mean."""
    pixels = to_tensor(Resize(GRID, "squash")(decode(path))[0])[None]
    patches = F.unfold(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5)[0]
    return {"": rearrange(patches - patches.mean(0), "c (h w) -> c h w", h=GRID)}


def predictions(pairs: Sequence[Pair], see: Callable[[Path], Maps], tap: str | None = None) -> dict[str, list[Points]]:
    """Where each pair's points are found, by tap; `see` is asked once for each image, as pairs of a source follow."""
    found: dict[str, list[Points]] = {}
    source = lru_cache(maxsize=1)(see)
    for pair in pairs:
        target = see(pair.target)
        for key, values in source(pair.source).items():
            if tap in (None, key):
                found.setdefault(key, []).append(match(pair, values, target[key]))
    return found


def match(pair: Pair, source: Float[Tensor, "c h w"], target: Float[Tensor, "c h w"]) -> Points:
    """The most similar pixels of the target, with the maps spread over the whole images."""
    one, other = (FeatureMap(maps, frame(size)) for maps, size in zip((source, target), sizes_of(pair), strict=True))
    return nearest(one, other, torch.from_numpy(pair.source_points).float(), exact=True).points.numpy()


def stayed(pair: Pair) -> Points:
    """The points at the same place in the target."""
    one, other = (FeatureMap(torch.zeros(1, 1, 1), frame(size)) for size in sizes_of(pair))
    return same_position(torch.from_numpy(pair.source_points), one, other).numpy()


def sizes_of(pair: Pair) -> tuple[Size, Size]:
    """(width, height) of both images."""
    assert pair.source_size is not None and pair.target_size is not None  # `read_pairs` has looked
    return pair.source_size, pair.target_size


def frame(size: Size) -> Size:
    """(H, W) of (width, height)."""
    return size[1], size[0]


def best(pairs: Sequence[Pair], found: Mapping[str, Sequence[Points]]) -> str:
    """The tap with the highest PCK, the mean over the thresholds."""
    return max(found, key=lambda tap: score(pairs, found[tap]).averages["image"].mean())


def score(pairs: Sequence[Pair], predicted: Sequence[Points]) -> Pck:
    """PCK with the threshold a share of the target's longer side."""
    truth, kinds = [pair.target_points for pair in pairs], [str(pair.category) for pair in pairs]
    lengths = [max(sizes_of(pair)[1]) for pair in pairs]
    return pck(predicted, truth, lengths, protocol="dift", alphas=ALPHAS, categories=kinds)


def draw(pairs: Sequence[Pair], found: Mapping[str, Scores], size: int, path: Path) -> None:
    """The first photograph under each deformation, and where mini-unet finds some of its points."""
    from matplotlib.figure import Figure

    tap = found[f"mini-unet, {size} px"][0]
    see = partial(maps_of, diffusion(load("mini-unet"), "down.*,mid,up.*", size))
    shown = [next(pair for pair in pairs if pair.category == kind) for kind in CHOOSING]
    places, limit = predictions(shown, see, tap)[tap], ALPHAS[1]
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    for axes, pair, points in zip(figure.subplots(1, len(shown)), shown, places, strict=True):
        one, other = decode(pair.source), decode(pair.target)
        axes.imshow(np.hstack([np.asarray(one), np.asarray(other)]))
        axes.set_axis_off()
        right = np.linalg.norm(points - pair.target_points, axis=1) <= limit * max(other.size)
        axes.set_title(f"{pair.category}: {right.mean():.0%} within {limit:.0%} of the image", fontsize=9)
        for start, end, hit in list(zip(pair.source_points, points + [one.width, 0], right, strict=True))[::4]:
            axes.plot(*np.stack([start, end]).T, color="tab:green" if hit else "tab:red", linewidth=0.8, marker=".")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def section(found: Mapping[str, Scores], pairs: Sequence[Pair]) -> str:
    """The table, with what it means."""
    points = sum(len(pair.source_points) for pair in pairs)
    rows = []
    for name, (tap, scores) in found.items():
        whole = [percent(value) for value in scores.averages["image"]]
        kinds = [percent(scores.categories[kind]["image"][1]) for kind in KINDS]
        rows.append([name + (f", `{tap}`" if tap else ""), *whole, *kinds])
    head = ["features", *(f"PCK@{alpha:g}" for alpha in ALPHAS), *(f"{kind} @{ALPHAS[1]:g}" for kind in KINDS)]
    return f"""Made by `python benchmarks/correspondence.py`: photographs of scikit-image, {SIDE} pixels on the longer
side, deformed by known maps, {len(pairs)} pairs with {points} points. A point is right within alpha of the image's
longer side, counted for each pair and averaged over pairs, in percent. The match is the most similar pixel by cosine.
Taps were chosen on other deformations of the same photographs. The bundled models have only seen clothes, in grey, of
32 pixels; untrained networks have random weights. Nothing here tries flips, so a mirrored picture shows which features
know left from right. Positions removed: less the mean, over the images that the taps were chosen on, of the features at
each position.

{table(head, rows)}

![points found under three deformations]({PICTURE})"""


def percent(share: float) -> str:
    """A share as percent with one decimal."""
    return f"{100 * float(np.asarray(share)):.1f}"


if __name__ == "__main__":
    main()
