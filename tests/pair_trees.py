"""Small trees of image pairs in the published layouts, with pictures that have something to match."""

import csv
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 30), (28, 36), (32, 32))  # width, height


def texture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture: what neighbouring pixels show differs little, and no two places are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_texture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texture(seed, size).save(path)
    return path


def write_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def write_spair(folder: Path, splits: Sequence[str] = ("test",)) -> Path:
    """Two categories of three images, and of each category the pairs (0, 1), (1, 2), (2, 0); the root."""
    root, number = folder / "SPair-71k", 0
    rng = np.random.default_rng(5)
    for kind, category in enumerate(("cat", "cow")):
        for image, size in enumerate(SIZES):
            write_texture(root / f"JPEGImages/{category}/{image}.png", 10 * kind + image, size)
    for split in splits:
        (root / "PairAnnotation" / split).mkdir(parents=True)
        for category in ("cat", "cow"):
            for source, target in ((0, 1), (1, 2), (2, 0)):
                number += 1
                name = f"{number:06d}-{source}-{target}:{category}"
                content = _annotation(rng, category, source, target)
                (root / "PairAnnotation" / split / f"{name}.json").write_text(json.dumps(content))
    return root


def _annotation(rng: np.random.Generator, category: str, source: int, target: int) -> dict[str, object]:
    """Three to five whole-number points at the same share of both images, and boxes of most of the images."""
    shares = rng.uniform(0.1, 0.9, (int(rng.integers(3, 6)), 2))
    points = [np.floor(shares * SIZES[image]).tolist() for image in (source, target)]
    boxes = [[2, 1, SIZES[image][0] - 4, SIZES[image][1] - 2] for image in (source, target)]
    found: dict[str, object] = {"category": category, "mirror": 0, "kps_ids": [str(n) for n in range(len(shares))]}
    for name, image, own, box in zip(("src", "trg"), (source, target), points, boxes, strict=True):
        found |= {f"{name}_imname": f"{image}.png", f"{name}_imsize": [*SIZES[image], 3]}
        found |= {f"{name}_kps": own, f"{name}_bndbox": box}
    return found


def write_pascal(folder: Path) -> Path:
    """Lists of a test and a val pair of cats, without annotations, so without boxes; the root."""
    root, places = folder / "PF-dataset-PASCAL", "PF-dataset-PASCAL/JPEGImages"
    for image, size in enumerate(SIZES):
        write_texture(root / f"JPEGImages/{image}.png", image, size)
    names = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB"]
    for split, (source, target) in {"test": (0, 1), "val": (1, 2)}.items():
        row = [f"{places}/{source}.png", f"{places}/{target}.png", 8, "3;20;11", "4;9;15", "5;14;9", "7;11;20"]
        write_rows(root / f"{split}_pairs_pf_pascal.csv", names, [row])
    return root


def write_willow(folder: Path) -> Path:
    """A pair of ducks with ten points; the root."""
    root = folder / "PF-dataset"
    names = [f"PF-dataset/duck(S)/{image}.png" for image in (0, 1)]
    for image, name in enumerate(names):
        write_texture(folder / name, image, SIZES[image])
    values = np.random.default_rng(6).integers(2, 26, 40).tolist()
    letters = [f"{axis}{side}{index}" for side in "AB" for axis in "XY" for index in range(1, 11)]
    write_rows(root / "test_pairs_pf.csv", ["imageA", "imageB", *letters], [[*names, *values]])
    return root


def write_tss(root: Path) -> Path:
    """A pair in each of two groups: image2 is image1 moved right by 3 and down by 2 pixels."""
    for seed, name in enumerate(("FG3DCar/001_005", "PASCAL/bike_01_03")):
        whole = texture(seed, (40, 32))
        for number, (left, top) in ((1, (3, 2)), (2, (0, 0))):
            path = root / name / f"image{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.crop((left, top, left + 36, top + 28)).save(path)
            flow = np.full((28, 36, 2), 1e10)
            flow[6:22, 6:30] = (3, 2) if number == 1 else (-3, -2)
            header = struct.pack("<fii", 202021.25, 36, 28)
            (root / name / f"flow{number}.flo").write_bytes(header + flow.astype("<f4").tobytes())
        (root / name / "flip_gt.txt").write_text("0")
    return root


def write_own(folder: Path, rows: Sequence[Sequence[object]] | None = None) -> Path:
    """A list of two pairs of pictures a.png, b.png, c.png; the folder."""
    for seed, name in enumerate("abc"):
        write_texture(folder / f"{name}.png", seed, SIZES[seed])
    given = rows or [["a.png", "b.png", 5, 6, 7, 8], ["a.png", "b.png", 30, 20, 20, 30], ["b.png", "c.png", 3, 4, 5, 6]]
    write_rows(folder / "pairs.csv", ["source", "target", "x1", "y1", "x2", "y2"], given)
    return folder
