"""Images to be matched with captions: the form every compositional benchmark comes in, and a list that holds any."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Picture = Path | bytes  # a file, or the bytes of one
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """Images and captions of which each pair is judged.

    right: for each image the place of its caption, None for an image that only distracts; a caption is right for at
    most one image. tags: the groups in which the example counts. Raises ValueError where there is nothing to choose,
    and for captions of which two are the same, so that none of them could win.
    """

    id: str
    images: tuple[Picture, ...] = field(repr=False)
    captions: tuple[str, ...]
    right: tuple[int | None, ...]
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = f"{len(self.images)} images, {len(self.captions)} captions"
        if min(len(self.images), len(self.captions)) < 1 or len(self.images) * len(self.captions) < 2:
            raise ValueError(f"example {self.id} has {counts}; give one image with several captions, or more of both")
        places = [place for place in self.right if place is not None]
        outside = [place for place in places if not 0 <= place < len(self.captions)]
        if len(self.right) != len(self.images) or not places or outside or len(set(places)) < len(places):
            raise ValueError(
                f"example {self.id} has {counts} and right={list(self.right)}; give each image the place of its own "
                f"caption, 0 ... {len(self.captions) - 1}, or None, and one at least a caption"
            )
        if repeated := [text for text, count in Counter(self.captions).items() if count > 1]:
            raise ValueError(f"example {self.id} has the caption {repeated[0]!r} more than once; give each once")


def read_captions(source: str | Path) -> list[Example]:
    """The examples of a .csv or .parquet list, in its order; paths of images are relative to the list's folder.

    Either a row an example, with the columns `image`, `caption_0`, `caption_1`, ... (rows may have fewer; in Parquet
    also a list `captions`) and `right`, the number of the right one, 0 without that column. Or, with a column `pair`,
    a row an image: `image` and its `caption` (empty for an image that only distracts), and rows of the same pair are
    one example. Both may have `id` and `tag`. In Parquet, images may also be bytes, or a struct of bytes and path.
    Raises ValueError, naming the row, for what is not so, FileNotFoundError for a list or images that are not there.
    """
    path = Path(source)
    rows = _read_rows(path)
    columns = [name for name in rows[0] if name] if rows else []  # a .csv row's surplus cells go by no name
    captions = ["caption"] if "pair" in columns else [name for name in columns if _is_caption(name)]
    if "image" not in columns or not set(captions) & set(columns):
        have = f"the columns {', '.join(columns)}" if columns else "no rows"
        raise ValueError(f"{path} has {have}; it needs image with caption_0, caption_1, ... or with pair and caption")
    return checked(_pairs(rows, path) if "pair" in columns else _choices(rows, path), path)


def checked(examples: Sequence[Example], source: Path) -> list[Example]:
    """The examples; ValueError where there is none or ids repeat, FileNotFoundError naming images that are missing."""
    if not examples:
        raise ValueError(f"no example in {source}; give a benchmark that has some")
    twice = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids occur more than once in {source}: {', '.join(twice[:3])}")
    paths = {image for example in examples for image in example.images if isinstance(image, Path)}
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        some = ", ".join(map(str, missing[:3]))
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} images of {source} are not there: {some}")
    return list(examples)


def read_parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file; ValueError, naming it, where it is none."""
    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def picture(cell: Any, folder: Path) -> Picture:
    """A cell that names or holds an image: a path relative to `folder`, bytes, or the hub's struct of both."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return folder / cell
    if isinstance(cell, bytes) and cell:
        return cell
    raise ValueError(f"no image in {cell!r}; give a path or the bytes of an image")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no list {path}; give a .csv or .parquet file")
    if path.suffix.lower() == ".parquet":
        return read_parquet_rows(path)
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is no list; give a .csv or .parquet file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return list(csv.DictReader(file, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error


def _choices(rows: Sequence[Row], path: Path) -> list[Example]:
    """A row an example: one image and its captions."""
    examples = []
    for number, row in enumerate(rows):
        try:
            image, right = picture(row["image"], path.parent), row.get("right")
            place = 0 if right is None or right == "" else int(right)
            examples.append(Example(_name(row, number), (image,), _captions(row), (place,), _tags(row)))
        except ValueError as error:
            raise ValueError(f"{path}, row {number + 1}: {error}") from error
    return examples


def _pairs(rows: Sequence[Row], path: Path) -> list[Example]:
    """A row an image: those of one pair in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for number, row in enumerate(rows):
        if row["pair"] is None or row["pair"] == "":
            raise ValueError(f"{path}, row {number + 1} has no pair; each image needs one")
        groups.setdefault(str(row["pair"]), []).append(row)
    examples = []
    for name, members in groups.items():
        try:
            images = tuple(picture(row["image"], path.parent) for row in members)
            captioned = [index for index, row in enumerate(members) if row["caption"]]
            right = tuple(captioned.index(index) if index in captioned else None for index in range(len(members)))
            captions = tuple(str(members[index]["caption"]) for index in captioned)
            examples.append(Example(name, images, captions, right, _tags(members[0])))
        except ValueError as error:
            raise ValueError(f"{path}, pair {name}: {error}") from error
    return examples


def _is_caption(column: str) -> bool:
    return column == "captions" or (column.startswith("caption_") and column[8:].isdecimal())


def _captions(row: Row) -> tuple[str, ...]:
    if row.get("captions") is not None:
        return tuple(map(str, row["captions"]))
    names = [name for name in row if name and name != "captions" and _is_caption(name)]
    cells = [row[name] for name in sorted(names, key=lambda name: int(name[8:]))]
    filled = [cell is not None and cell != "" for cell in cells]
    if filled != sorted(filled, reverse=True):
        raise ValueError("a caption is missing before the last one; fill caption_0, caption_1, ... without gaps")
    return tuple(str(cell) for cell in cells[: sum(filled)])


def _name(row: Row, number: int) -> str:
    given = row.get("id")
    return str(number) if given is None or given == "" else str(given)


def _tags(row: Row) -> tuple[str, ...]:
    return tuple(words([row.get("tag")]))


def words(cells: Iterable[Any]) -> list[str]:
    """What cells of tags say, a list of them as well as a single one; empty ones say nothing."""
    flat = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
    return list(dict.fromkeys(str(one) for one in flat if one is not None and one != ""))
