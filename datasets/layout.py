"""Published layouts: the folder a data set lies in, its lists, and errors that say what was looked for."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from repkit.images import EXTENSIONS


def find_folder(root: str | Path, what: str, needed: Sequence[str], names: Sequence[str] = ()) -> Path:
    """The data set's own folder, in which all of `needed` lies: root, or root with one of `names`.

    Raises FileNotFoundError that says what was looked for and what is missing.
    """
    places = [Path(root), *(Path(root) / name for name in names)]
    lacks = {place: [name for name in needed if not (place / name).exists()] for place in places}
    best = min(places, key=lambda place: len(lacks[place]))
    if not lacks[best]:
        return best
    raise FileNotFoundError(
        f"no {what} in {' or '.join(map(str, places))}: looked for {', '.join(needed)}, and "
        f"{best}{'' if best.is_dir() else ', which is no folder,'} lacks {', '.join(lacks[best])}; "
        "give the folder that its archive was unpacked to"
    )


def check_split(split: str, have: Iterable[str], what: str) -> None:
    """Raise ValueError, listing those that exist, for another split."""
    if split not in have:
        raise ValueError(f"no split {split!r} of {what}; have {', '.join(have)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped.

    Raises FileNotFoundError without the file, ValueError where it has none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no list {path}; unpack the whole archive")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); unpack it again") from error
    if not (filled := [line for line in lines if line]):
        raise ValueError(f"the list {path} is empty; unpack it again")
    return filled


def read_fields(path: Path, count: int) -> list[list[str]]:
    """The first `count` words of each line; the last takes the rest where the line has more.

    Raises ValueError, naming file and line, where a line has fewer.
    """
    rows = [line.split(None, count - 1) for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) < count:
            raise ValueError(f"{path}, line {number} has {len(row)} words; it needs {count}")
    return rows


def present(paths: Sequence[Path], source: Path) -> tuple[Path, ...]:
    """The paths; FileNotFoundError, naming some, where files that `source` lists are not there."""
    if missing := [path for path in paths if not path.is_file()]:
        some = ", ".join(map(str, missing[:3]))
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} files of {source} are not there: {some}")
    return tuple(paths)


def pictures(folder: Path) -> list[Path]:
    """The images that lie directly in a folder, by name; FileNotFoundError without the folder or images."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; unpack the whole archive")
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(EXTENSIONS) and name[0] != ".")
    found = [folder / name for name in names]
    if not found:
        raise FileNotFoundError(f"no image in {folder}; looked for {', '.join(EXTENSIONS)}")
    return found


def paired(images: Sequence[Path], masks: Sequence[Path], image_end: str = "", mask_end: str = "") -> tuple[Path, ...]:
    """The mask of each image: the one of the same name, without suffix and without these ends of it.

    Raises ValueError that lists images without a mask and masks without an image, and for two of one name.
    """
    of_image = _by_name(images, image_end)
    of_mask = _by_name(masks, mask_end)
    problems = [
        f"{len(alone)} {what} ({', '.join(alone[:3])})"
        for what, ours, theirs in (
            ("images without a mask", of_image, of_mask),
            ("masks without an image", of_mask, of_image),
        )
        if (alone := [str(path) for name, path in ours.items() if name not in theirs])
    ]
    if problems:
        raise ValueError(f"{' and '.join(problems)}; give each image a mask of its name")
    return tuple(of_mask[name] for name in of_image)


def _by_name(paths: Sequence[Path], end: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = path.stem.removesuffix(end)
        if name in found:
            raise ValueError(f"{found[name]} and {path} have one name; rename one of them")
        found[name] = path
    return found


def numbered(names: Sequence[str], classes: Sequence[str], source: Path) -> Int64[np.ndarray, " n"]:
    """The place of each name in `classes`; ValueError, naming the list, for one that is not there."""
    place = {name: index for index, name in enumerate(classes)}
    if unknown := [name for name in names if name not in place]:
        raise ValueError(f"{source} has the class {unknown[0]!r}, which is none of the {len(classes)} known")
    return np.array([place[name] for name in names], np.int64)
