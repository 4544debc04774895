"""SPair-71k (Min et al. 2019): pairs of 18 categories of objects, with keypoints and boxes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repkit.datasets.pairs import Box, Pair, Points, checked

_KEYS = ("src_imname", "trg_imname", "src_imsize", "trg_imsize", "src_kps", "trg_kps", "kps_ids", "src_bndbox",
         "trg_bndbox", "category")  # fmt: skip


def read_spair(root: str | Path, split: str = "test", *, categories: Sequence[str] | None = None) -> list[Pair]:
    """The pairs of a split (trn, val, test), in the order of their numbers; `categories` None is all.

    root: SPair-71k with JPEGImages/<category>/ and PairAnnotation/<split>/*.json, or the folder above it. Points are
    as published: a few may lie on or beyond an edge.
    Raises FileNotFoundError where these or images are not there, ValueError, naming the file, for damaged annotations.
    """
    folder = Path(root) if (Path(root) / "PairAnnotation").is_dir() else Path(root) / "SPair-71k"
    annotations = folder / "PairAnnotation" / split
    if not annotations.is_dir():
        have = sorted(path.name for path in annotations.parent.glob("*/"))
        hint = f"have {', '.join(have)}" if have else "give the folder that SPair-71k.tar.gz was unpacked to"
        raise FileNotFoundError(f"no folder {annotations}; {hint}")
    paths = sorted(annotations.glob("*.json"))
    if categories is not None:
        have = sorted(path.name for path in (folder / "JPEGImages").glob("*/"))
        if unknown := [name for name in categories if name not in have]:
            raise ValueError(f"no category {unknown[0]!r}; have {', '.join(have)}")
        # The names end in ":<category>.json", on some systems with another sign for the colon.
        paths = [path for path in paths if path.stem.endswith(tuple(categories))]
    pairs = [_pair(path, folder / "JPEGImages") for path in paths]
    return checked([pair for pair in pairs if categories is None or pair.category in categories], annotations)


def _pair(path: Path, images: Path) -> Pair:
    found = _annotation(path)
    try:
        return Pair(
            path.stem,
            images / found["category"] / found["src_imname"],
            images / found["category"] / found["trg_imname"],
            _points(found["src_kps"]),
            _points(found["trg_kps"]),
            tuple(str(name) for name in found["kps_ids"]),
            found["category"],
            _box(found["src_bndbox"]),
            _box(found["trg_bndbox"]),
            (int(found["src_imsize"][0]), int(found["src_imsize"][1])),
            (int(found["trg_imsize"][0]), int(found["trg_imsize"][1])),
            mirrored=bool(found.get("mirror", 0)),
        )
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error


def _annotation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or (missing := [key for key in _KEYS if key not in found]):
        raise ValueError(f"{path} lacks {', '.join(missing) if isinstance(found, dict) else 'all'}; unpack it again")
    return found


def _points(rows: Any) -> Points:
    points = np.array(rows, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points of shape {list(points.shape)}; they need rows of x, y")
    return points


def _box(sides: Any) -> Box:
    left, top, right, bottom = (float(side) for side in sides)
    if not (left < right and top < bottom):
        raise ValueError(f"a box {sides}; it needs left, top, right, bottom")
    return left, top, right, bottom
