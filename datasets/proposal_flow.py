"""PF-Pascal and PF-Willow (Ham et al. 2016, 2018), with the lists of pairs that everybody evaluates on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from repkit.datasets.matlab import read_mat
from repkit.datasets.pairs import Box, Pair, Points, checked, chosen, extent, numbers, read_cells

PASCAL = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_SPLITS = {"trn": ("trn", "train"), "val": ("val",), "test": ("test",)}
_WILLOW_POINTS = 10


def read_pf_pascal(root: str | Path, split: str = "test", *, categories: Sequence[str] | None = None) -> list[Pair]:
    """The pairs of a split (trn, val, test), in the order of its list; `categories` None is all 20.

    root: PF-dataset-PASCAL with JPEGImages/, Annotations/<category>/*.mat and {val,test}_pairs_pf_pascal.csv, or the
    folder above it; the lists may lie in either, also as {trn,val,test}_pairs.csv. Points are those of the list, and
    boxes those of the annotations, None without them; a training list has no points, so they are those of the
    annotations, and its mirrored copies of pairs are left out.
    Raises FileNotFoundError for what is not there, ValueError, naming file and line, for what is damaged.
    """
    if split not in _SPLITS:
        raise ValueError(f"no split {split!r} of PF-Pascal; have {', '.join(_SPLITS)}")
    folder = _folder(Path(root), "PF-dataset-PASCAL", "JPEGImages")
    names = [f"{name}_pairs{end}.csv" for name in _SPLITS[split] for end in ("_pf_pascal", "")]
    path = _list(folder, names)
    rows = [(line, cells) for line, cells in read_cells(path)[1:] if len(cells) != 4 or cells[3] in ("0", "0.0")]
    pairs = [_pascal(folder, cells, path, line) for line, cells in rows]
    return checked(chosen(pairs, categories), path)


def read_pf_willow(root: str | Path, *, categories: Sequence[str] | None = None) -> list[Pair]:
    """All pairs (there is only a test set), each with ten points, in the order of the list; `categories` None is all.

    root: PF-dataset with <category>/*.png and test_pairs_pf.csv, or the folder above it; the list may lie in either,
    also as test_pairs.csv. Boxes are the extents of the points, since the data set has none.
    Raises FileNotFoundError for what is not there, ValueError, naming file and line, for what is damaged.
    """
    folder = _folder(Path(root), "PF-dataset", "")
    path = _list(folder, ["test_pairs_pf.csv", "test_pairs.csv"])
    pairs = [_willow(folder, cells, path, line) for line, cells in read_cells(path)[1:]]
    return checked(chosen(pairs, categories), path)


def _folder(root: Path, name: str, inside: str) -> Path:
    """The data set's own folder: the one below root, if there is one, or root."""
    for folder in (root / name, root):
        if (folder / inside).is_dir():
            return folder
    raise FileNotFoundError(f"no folder {root / name / inside} and no {root / inside}; give the folder {name}")


def _list(folder: Path, names: Sequence[str]) -> Path:
    found = [place / name for place in (folder, folder.parent) for name in names if (place / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no list {' or '.join(names)} in {folder} or {folder.parent}; put it there")
    return found[0]


def _pascal(folder: Path, cells: Sequence[str], path: Path, line: int) -> Pair:
    where = f"{path}, line {line}"
    if len(cells) not in (3, 4, 7):
        raise ValueError(f"{where} has {len(cells)} cells; it needs two images, class, and XA, YA, XB, YB (or flip)")
    category = _category(cells[2], where)
    images = [folder / "JPEGImages" / Path(name).name for name in cells[:2]]
    files = [folder / "Annotations" / category / f"{image.stem}.mat" for image in images]
    marked = [_annotation(file) if file.is_file() else None for file in files]
    boxes = [None if one is None else one[1] for one in marked]
    if len(cells) == 7:
        points = _listed(cells[3:], where)
        ids: Sequence[int] = range(len(points[0]))
    elif marked[0] is None or marked[1] is None:
        raise FileNotFoundError(f"{where} has no points, and {files[marked[0] is not None]} is not there")
    else:
        points, ids = _visible(marked[0][0], marked[1][0], where)
    return _made(where, line, images, points, ids, category, boxes)


def _willow(folder: Path, cells: Sequence[str], path: Path, line: int) -> Pair:
    where = f"{path}, line {line}"
    if len(cells) != 2 + 4 * _WILLOW_POINTS:
        raise ValueError(f"{where} has {len(cells)} cells; it needs two images, then XA, YA, XB and YB of 10 points")
    values = np.array(numbers(cells[2:], where))
    points = list(rearrange(values, "(image xy point) -> image point xy", image=2, xy=2))
    images = [folder.joinpath(*Path(name).parts[-2:]) for name in cells[:2]]
    boxes = [extent(one) for one in points]
    return _made(where, line, images, points, range(_WILLOW_POINTS), images[0].parent.name, boxes)


def _made(
    where: str,
    line: int,
    images: Sequence[Path],
    points: Sequence[Points],
    ids: Sequence[int],
    category: str,
    boxes: Sequence[Box | None],
) -> Pair:
    name = f"{line:05d}-{images[0].stem}-{images[1].stem}"
    try:
        return Pair(name, *images, *points, tuple(map(str, ids)), category, *boxes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _category(cell: str, where: str) -> str:
    [place] = numbers([cell], where)
    if place not in range(1, len(PASCAL) + 1):
        raise ValueError(f"{where}: class {cell}; have 1 ... {len(PASCAL)}")
    return PASCAL[int(place) - 1]


def _listed(cells: Sequence[str], where: str) -> list[Points]:
    """The points of both images from XA, YA, XB, YB, in each of which the values are joined by semicolons."""
    values = [numbers(cell.strip(";").split(";"), where) for cell in cells]
    if len({len(one) for one in values}) > 1:
        counts = ", ".join(str(len(one)) for one in values)
        raise ValueError(f"{where}: {counts} values in XA, YA, XB, YB; each point needs one in all")
    return [np.array(values[:2]).T, np.array(values[2:]).T]


def _annotation(path: Path) -> tuple[Points, Box]:
    """All keypoints of the category, NaN where one is not visible, and the object's box."""

    def take(found: Mapping[str, Any]) -> tuple[Points, Box]:
        left, top, right, bottom = (float(side) for side in np.ravel(found["bbox"]))
        return np.array(found["kps"], np.float64).reshape(-1, 2), (left, top, right, bottom)

    return read_mat(path, "kps and bbox", take)


def _visible(source: Points, target: Points, where: str) -> tuple[list[Points], list[int]]:
    """The points that are visible in both images, and which of the category's keypoints they are."""
    if len(source) != len(target):
        raise ValueError(f"{where}: annotations of {len(source)} and {len(target)} keypoints; they must be the same")
    both = np.isfinite(source).all(1) & np.isfinite(target).all(1)
    return [source[both], target[both]], np.flatnonzero(both).tolist()
