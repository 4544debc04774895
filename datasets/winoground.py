"""Winoground (Thrush et al. 2022): two images and two captions of the same words, 400 times. Gated: bring your own."""

import json
from pathlib import Path
from typing import Any

from repkit.datasets.captions import Example, Picture, checked, picture, read_parquet_rows, words
from repkit.images import EXTENSIONS

_NEEDED = ("id", "image_0", "image_1", "caption_0", "caption_1")


def read_winoground(root: str | Path, *, fine: bool = False) -> list[Example]:
    """The examples of a folder as it is published, or of a .parquet file with the hub's columns, in their order.

    A folder has `examples.jsonl` and `images/` (unpacked), or .parquet files, directly or in `data/`. Tags are the
    collapsed one (Object, Relation, Both), the secondary ones and the number of main predicates, with `fine` also the
    fine one.
    Raises FileNotFoundError where none of these is there or images are missing, ValueError for damaged examples.
    """
    folder = Path(root)
    for place in (folder, folder / "data"):
        if (place / "examples.jsonl").is_file():
            return checked(_read_jsonl(place / "examples.jsonl", fine), place / "examples.jsonl")
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    if not files:
        raise FileNotFoundError(
            f"no Winoground in {root}: no examples.jsonl and no .parquet, there or in data/; give the folder that "
            "facebook/winoground was downloaded to"
        )
    rows = [(row, path) for path in files for row in read_parquet_rows(path)]
    return checked([_example(row, path, path.parent, fine) for row, path in rows], folder)


def _read_jsonl(path: Path, fine: bool) -> list[Example]:
    images = path.parent / "images"
    if not images.is_dir():
        hint = "unpack images.zip there" if (path.parent / "images.zip").exists() else "put the images there"
        raise FileNotFoundError(f"no folder {images}; {hint}")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if row is not None:
            examples.append(_example(row, path, images, fine))
    return examples


def _example(row: Any, path: Path, folder: Path, fine: bool) -> Example:
    if not isinstance(row, dict) or (missing := [name for name in _NEEDED if row.get(name) in (None, "")]):
        lacks = ", ".join(missing) if isinstance(row, dict) else "all"
        raise ValueError(f"{path}: an example lacks {lacks}; it needs {', '.join(_NEEDED)}")
    predicates = row.get("num_main_preds")
    main = predicates and f"{predicates} main predicate{'s' * (int(predicates) > 1)}"
    # Copies without the collapsed tag have the fine one only.
    tags = [
        row.get("collapsed_tag") or row.get("tag"),
        row.get("secondary_tag"),
        main,
        row.get("tag") if fine else None,
    ]
    captions = (str(row["caption_0"]), str(row["caption_1"]))
    images = (_image(row["image_0"], folder), _image(row["image_1"], folder))
    return Example(str(row["id"]), images, captions, (0, 1), tuple(words(tags)))


def _image(cell: Any, folder: Path) -> Picture:
    """The published examples name images without their suffix."""
    found = picture(cell, folder)
    if isinstance(found, bytes) or found.suffix.lower() in EXTENSIONS:
        return found
    named = [found.with_name(found.name + suffix) for suffix in EXTENSIONS]
    return next((path for path in named if path.is_file()), named[0])
