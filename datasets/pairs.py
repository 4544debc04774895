"""Pairs of images with corresponding points: the form every benchmark of correspondence is read into, and own data."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import SEEK_CUR, BufferedReader, BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from PIL import Image, TiffImagePlugin

from repkit.images import FORMATS

Points = Float64[np.ndarray, "_n 2"]  # (x, y)
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Size = tuple[int, int]  # width, height
COLUMNS = ("source", "target", "x1", "y1", "x2", "y2")
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF
_WIDTH, _HEIGHT = 256, 257  # TIFF
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82"
_TELLING = b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt"  # chunks that may say which way up a PNG is


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and the points in them that correspond, row by row.

    Points are (x, y) in pixels, as their data set has them; names say of each row what it is (an id or a word), and are
    () where no row has one. Boxes are those of the object. category: what of the data set the pair is counted with.
    mirrored: the objects face opposite ways. flow: the file with dense truth, where there are no points
    (`tss.dense_points` reads it).
    Raises ValueError for points that are not finite or do not correspond in number.
    """

    id: str
    source: Path
    target: Path
    source_points: Points = field(repr=False)
    target_points: Points = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    category: str | None = None
    source_box: Box | None = None
    target_box: Box | None = None
    source_size: Size | None = None
    target_size: Size | None = None
    mirrored: bool = False
    flow: Path | None = None

    def __post_init__(self) -> None:
        counts = len(self.source_points), len(self.target_points), len(self.names) or len(self.source_points)
        if len(set(counts)) > 1:
            raise ValueError(
                f"pair {self.id} has {counts[0]} source points, {counts[1]} target points, {len(self.names)} names; "
                "give as many of each"
            )
        if not (np.isfinite(self.source_points).all() and np.isfinite(self.target_points).all()):
            raise ValueError(f"pair {self.id} has points that are not finite; leave out what is not visible")
        if not len(self.source_points) and self.flow is None:
            raise ValueError(f"pair {self.id} has no points; give at least one")


def read_pairs(source: str | Path) -> list[Pair]:
    """The pairs of people's own data: a .csv list, or a folder with `pairs.csv`; images are relative to its folder.

    A row a point, with the columns source, target, x1, y1 (in the source), x2, y2, and where wanted name and category;
    rows of the same two images are one pair, in the order in which they first come. Integer coordinates are pixel
    centres, of the image as it is shown (upright, where its EXIF data turn it); an image that cannot be read has no
    size, and its points are not checked.
    Raises ValueError, naming file and line, for what is not so and for points outside their image, FileNotFoundError
    for a list or images that are not there.
    """
    path = Path(source) / "pairs.csv" if Path(source).is_dir() else Path(source)
    if path != Path(source) and not path.is_file():
        raise FileNotFoundError(
            f"no list of pairs {path}; write one with a row a point and the columns {', '.join(COLUMNS)}, "
            "and where wanted name and category"
        )
    groups: dict[tuple[str, str], list[tuple[int, dict[str, str]]]] = {}
    for line, row in read_rows(path, COLUMNS):
        groups.setdefault((row["source"], row["target"]), []).append((line, row))
    lines = [rows[0][0] for rows in groups.values()]
    pairs = checked([_own(path, rows) for rows in groups.values()], path, lines)
    for pair, rows in zip(pairs, groups.values(), strict=True):
        _check_inside(pair, [f"{path}, line {line}" for line, _ in rows])
    return pairs


def read_rows(path: Path, needed: Sequence[str], what: str = "pairs") -> list[tuple[int, dict[str, str]]]:
    """The rows of a .csv file by their columns' names, each with the number of its last line; what: as `read_cells`."""
    (_, names), *rows = read_cells(path, what)
    if lacking := [name for name in needed if name not in names]:
        raise ValueError(f"{path} has the columns {', '.join(names)}; it lacks {', '.join(lacking)}")
    return [(line, dict(zip(names, cells, strict=True))) for line, cells in rows]


def read_cells(path: Path, what: str = "pairs") -> list[tuple[int, list[str]]]:
    """The lines of a .csv file, the one with the names first, each with its number.

    what: that the file is to list, for messages.
    Raises FileNotFoundError without the file, ValueError where it is empty or lines have more or fewer cells.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no list of {what} {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} is empty; it needs a line with the names of its columns")
    for line, cells in lines:
        if len(cells) != len(lines[0][1]):
            raise ValueError(f"{path}, line {line} has {len(cells)} cells, and the first line {len(lines[0][1])}")
    return lines


def numbers(cells: Sequence[str], where: str) -> list[float]:
    """The cells as finite numbers; ValueError, saying where, for one that is none."""
    found = []
    for cell in cells:
        try:
            found.append(float(cell))
        except ValueError:
            raise ValueError(f"{where}: {cell!r} is no number") from None
    if not np.isfinite(found).all():
        raise ValueError(f"{where}: {', '.join(cells)} are not all finite")
    return found


def checked(pairs: Sequence[Pair], source: Path, lines: Sequence[int] | None = None) -> list[Pair]:
    """The pairs, with the sizes of their images, None of those that cannot be read.

    lines: of `source`, where each pair is written.
    Raises ValueError where there is none or ids repeat, FileNotFoundError naming images that are missing.
    """
    if not pairs:
        raise ValueError(f"no pairs in {source}; give a data set that has some")
    ids = [pair.id for pair in pairs]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"pair {twice} occurs more than once in {source}")
    places = [""] * len(pairs) if lines is None else [f" (line {line})" for line in lines]
    paths: dict[Path, str] = {}
    for pair, place in zip(pairs, places, strict=True):
        paths.setdefault(pair.source, place)
        paths.setdefault(pair.target, place)
    if missing := [f"{path}{place}" for path, place in paths.items() if not path.is_file()]:
        some = ", ".join(missing[:3])
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} images of {source} are not there: {some}")
    known = {pair.source: pair.source_size for pair in pairs} | {pair.target: pair.target_size for pair in pairs}
    sizes = {path: known[path] or image_size(path) for path in paths}
    return [replace(pair, source_size=sizes[pair.source], target_size=sizes[pair.target]) for pair in pairs]


def chosen(pairs: Sequence[Pair], categories: Sequence[str] | None) -> list[Pair]:
    """The pairs of some categories, None for all; ValueError listing those that exist for another one."""
    if categories is None:
        return list(pairs)
    have = sorted({pair.category for pair in pairs if pair.category is not None})
    if unknown := [name for name in categories if name not in have]:
        raise ValueError(f"no category {unknown[0]!r}; have {', '.join(have)}")
    return [pair for pair in pairs if pair.category in categories]


def extent(points: Points) -> Box:
    """The smallest box that holds the points."""
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right), float(bottom)


def image_size(path: Path) -> Size | None:
    """(width, height) of an image as `decode` gives it, read without its pixels; None where it cannot be read."""
    try:
        with path.open("rb") as file, Image.open(_without_pixels(file), formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # PIL may have turned the size already
                width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
            turned = _orientation(image) in _ON_ITS_SIDE
    except Exception:  # a broken file makes PIL raise nearly anything
        return None
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int | None:
    try:
        return Image.Image.getexif(image).get(_ORIENTATION)  # a PNG's own method decodes the pixels first
    except Exception:  # as for `decode`, damaged metadata is no reason to refuse the image
        return None


def _without_pixels(file: BufferedReader) -> BufferedReader | BytesIO:
    """A PNG of the file's `_TELLING` chunks, which may also come after the pixels; the file, where it is no PNG."""
    kept = file.read(len(_PNG))
    if kept != _PNG:
        file.seek(0)
        return file
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4]) + 4  # and the checksum
        if head[4:] not in _TELLING:
            file.seek(length, SEEK_CUR)
        elif len(content := file.read(length)) == length:
            kept += head + content
    return BytesIO(kept + _PNG_END)


def _own(path: Path, rows: Sequence[tuple[int, Mapping[str, str]]]) -> Pair:
    """One pair of the user's list."""
    first_line, first = rows[0]
    for line, row in rows:
        if not row["source"] or not row["target"]:
            raise ValueError(f"{path}, line {line} names no source or no target; each row needs both")
        if row.get("category") != first.get("category"):
            raise ValueError(
                f"{path}, line {line}: category {row['category']!r}, but {first['category']!r} in line {first_line} "
                "for the same two images; give a pair one category"
            )
    points = np.array([numbers([row[name] for name in COLUMNS[2:]], f"{path}, line {line}") for line, row in rows])
    names = tuple(row.get("name", "") for _, row in rows)
    source, target = path.parent / first["source"], path.parent / first["target"]
    name, category = f"{first['source']}>{first['target']}", first.get("category") or None
    return Pair(name, source, target, points[:, :2], points[:, 2:], names if any(names) else (), category)


def _check_inside(pair: Pair, places: Sequence[str]) -> None:
    """Refuse points outside their image, saying where each is written."""
    for points, size, path in (
        (pair.source_points, pair.source_size, pair.source),
        (pair.target_points, pair.target_size, pair.target),
    ):
        if size is None:
            continue
        outside = ((points < -0.5) | (points > np.array(size) - 0.5)).any(1)
        if outside.any():
            index = int(outside.argmax())
            x, y = points[index]
            raise ValueError(
                f"{places[index]}: ({x:g}, {y:g}) lies outside {path}, which has {size[0]}x{size[1]} pixels"
            )
