"""What images there are: a folder, a class tree with splits, or a list becomes one table, before any is opened."""

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from repkit.images import EXTENSIONS

COLUMNS = ("id", "path", "label", "split", "prompt")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LISTS = (".csv", ".parquet")
_log = logging.getLogger("repkit")


def list_images(source: str | Path | Sequence[str | Path], *, splits: bool = True) -> pa.Table:
    """Table of strings id, path, label, split, prompt (the last three may be null), `root` in the schema's metadata.

    `source` is one of
    - a folder: every image below it, sorted by id; symbolic links are followed, hidden names left out. Where no image
      lies directly in it, its sub-folders are classes; where these are all called train (training), val (valid,
      validation, dev) or test (testing), in any case, they are splits, each again plain or of classes (`splits=False`:
      classes);
    - a .csv or .parquet list with a column path (relative to the list's folder, or absolute) and any of id, label,
      split, prompt, in its order; splits are renamed train, val and test from the other names above;
    - one image file, or a sequence of paths, in its order.

    `id` is unique: the POSIX path relative to the root (absolute for an absolute one outside); `path` is absolute.
    Files need not exist, nor be readable; one whose name is not valid UTF-8 is listed with its bytes as \\xNN, a file
    that does not exist. Raises ValueError where there is no image, for a list without its column, unreadable or empty,
    for duplicate ids, and for a root whose name is not UTF-8; OSError where `source` or a folder below cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _sequence([os.path.abspath(path) for path in source])
    root = os.path.abspath(source)
    suffix = Path(root).suffix.lower()
    if os.path.isdir(root):
        return _folder(root, splits)
    if not os.path.exists(root):
        raise FileNotFoundError(errno.ENOENT, "no such folder, list or image", str(source))
    if suffix in _LISTS:
        return _list(root)
    if suffix in EXTENSIONS:
        return _sequence([root])
    raise ValueError(f"{source} is no folder, no list ({', '.join(_LISTS)}) and no image ({', '.join(EXTENSIONS)})")


def _sequence(paths: list[str]) -> pa.Table:
    if not paths:
        raise ValueError("the sequence of images is empty; give at least one path")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return _table(root, {"id": [_relative(path, root) for path in paths], "path": paths})


def _folder(root: str, splits: bool) -> pa.Table:
    ids = sorted(_relative(path, root) for path in _walk(root, ()))
    if not ids:
        raise ValueError(f"no image in {root} or below; looked for {', '.join(EXTENSIONS)}")
    parts = [tuple(name.split("/")) for name in ids]
    split_of = _splits(parts) if splits else {}
    tops = [part[0] if split_of else "" for part in parts]  # the folder whose sub-folders are classes
    below = [part[1:] if split_of else part for part in parts]
    flat = {top for top, rest in zip(tops, below, strict=True) if len(rest) == 1}
    deep = {top for top, rest in zip(tops, below, strict=True) if len(rest) > 1}
    _warn_of_strays(
        root, [name for name, top, rest in zip(ids, tops, below, strict=True) if len(rest) == 1 and top in deep]
    )
    columns: dict[str, Sequence[str | None]] = {
        "id": ids,
        "path": [os.path.join(root, name) for name in ids],
        "label": [None if top in flat else rest[0] for top, rest in zip(tops, below, strict=True)],
        "split": [split_of.get(top) for top in tops],
    }
    return _table(root, columns)


def _warn_of_strays(root: str, strays: list[str]) -> None:
    if strays:
        message = "%d images in %s lie beside folders, which are no labels therefore (else move them away): %s"
        _log.warning(message, len(strays), root, ", ".join(strays[:5]))


def _splits(parts: list[tuple[str, ...]]) -> dict[str, str]:
    """Folder -> split, empty unless every image lies in a folder that is called like one."""
    tops = {part[0] if len(part) > 1 else "." for part in parts}
    named = {top: SPLITS[top.lower()] for top in sorted(tops) if top.lower() in SPLITS}
    others = sorted(tops - named.keys())
    if named and others:
        _log.warning("%s not taken as splits: there are images in %s too", ", ".join(named), ", ".join(others[:5]))
    return {} if others else named


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a symbolic link back up
        return
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _walk(path, (*above, here))
        elif os.path.splitext(name)[1].lower() in EXTENSIONS:
            yield path


def _list(source: str) -> pa.Table:
    try:
        table = _read_csv(source) if source.lower().endswith(".csv") else _read_parquet(source)
        values = {name: table.column(name).cast(pa.string()).to_pylist() for name in table.column_names}
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"cannot read the list {source}: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        raise ValueError(f"the list {source} has no rows; give one for each image, with at least its path")
    empty = [row for row, path in enumerate(values["path"], 1) if not path]
    if empty:
        raise ValueError(
            f"the list {source} has no path in row {empty[0]} ({len(empty)} such rows); fill or delete them"
        )
    return _listed(os.path.dirname(source), values)


def _read_csv(source: str) -> pa.Table:
    # As text, so that a label 007 stays one; an empty field is null, but the words "NA" and "null" are words.
    types = {name: pa.string() for name in COLUMNS}
    options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    table = pa.csv.read_csv(source, convert_options=options)
    return table.select(_known(table.column_names))


def _read_parquet(source: str) -> pa.Table:
    with pa.parquet.ParquetFile(source) as file:
        return file.read(columns=_known(file.schema_arrow.names))


def _known(names: list[str]) -> list[str]:
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if "path" not in names or twice:
        problem = f"several columns {twice[0]}" if twice else "no column path"
        raise ValueError(f"{problem}; it has {', '.join(names)}, and needs path, with any of id, label, split, prompt")
    unused = [name for name in names if name not in COLUMNS]
    if unused:
        _log.warning("columns not used: %s", ", ".join(unused))
    return [name for name in COLUMNS if name in names]


def _listed(root: str, values: dict[str, list[str | None]]) -> pa.Table:
    entries = [path or "" for path in values["path"]]
    paths = [os.path.normpath(os.path.join(root, entry)) for entry in entries]
    derived = [_list_id(path, root, entry) for path, entry in zip(paths, entries, strict=True)]
    nothing: list[str | None] = [None] * len(paths)
    given = {name: [value or None for value in values.get(name, nothing)] for name in COLUMNS}
    columns: dict[str, Sequence[str | None]] = {
        **given,
        "id": [name or other for name, other in zip(given["id"], derived, strict=True)],
        "path": paths,
        "split": [SPLITS.get(split.lower(), split) if split else None for split in given["split"]],
    }
    return _table(root, columns)


def _list_id(path: str, root: str, entry: str) -> str:
    inside = os.path.commonpath([path, root]) == root
    return _relative(path, root) if inside or not os.path.isabs(entry) else Path(path).as_posix()


def _relative(path: str, root: str) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _table(root: str, columns: Mapping[str, Sequence[str | None]]) -> pa.Table:
    twice = [name for name, count in Counter(columns["id"]).items() if count > 1]
    if twice:
        some = ", ".join(map(str, twice[:5]))
        raise ValueError(f"{len(twice)} ids occur more than once: {some}; list each image once")
    if _readable(root) != root:
        raise ValueError(f"the folder name {root!r} is not valid UTF-8; rename it")
    schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata={"root": root})
    filled = {name: list(map(_readable, columns.get(name, [None] * len(columns["id"])))) for name in COLUMNS}
    strange = [new for old, new in zip(columns["path"], filled["path"], strict=True) if old != new]
    if strange:
        _log.warning(
            "%d file names are not valid UTF-8, rename them: %s", len(strange), ", ".join(map(str, strange[:5]))
        )
    return pa.table(filled, schema=schema)


def _readable(name: str | None) -> str | None:
    """The name as Unicode text, which Arrow and JSON need; other bytes are written as \\xNN."""
    return name and os.fsencode(name).decode("utf-8", "backslashreplace")
