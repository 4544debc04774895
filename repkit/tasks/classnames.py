"""Classes, prompts and priors as they are written on the command line or in files."""

import csv
import errno
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from repkit.backbones.base import Backbone
from repkit.zeroshot.errortable import Label

_FILES = (".txt", ".csv")
_COLUMNS = ("prompt", "classname", "classidx")

Classes = dict[Label, list[Label]]


def read_classes(given: str | None, backbone: Backbone) -> Classes:
    """The classes a backbone is asked about, each with its prompts, in order; `given` are names with commas between
    or a file, and None asks about the model's own classes.

    A text file has a name on each line; a .csv has the columns prompt, classname and classidx, with as many rows for a
    class as it has prompts, and its classes come in the order of classidx. Numbers are indices for models of labels.
    Raises ValueError for fewer than two classes, for what is there twice, and for None where the model has no names.
    """
    if given is None:
        classes = {name: [name] for name in _own(backbone)}
    elif _is_file(given):
        classes = _read_csv(Path(given)) if given.lower().endswith(".csv") else _read_lines(Path(given))
    else:
        classes = _names(
            {f"place {place}": name.strip() for place, name in enumerate(given.split(","), 1)}, "--classes"
        )
    if len(classes) < 2:
        raise ValueError(
            f"only {next(iter(classes))!r} in {given or backbone.name}; a posterior needs two classes or more"
        )
    given_as: dict[Label, str] = {}
    for name in classes:
        if (first := given_as.setdefault(_as_told(name, backbone), name)) != name:
            raise ValueError(f"{first!r} and {name!r} are both class {_as_told(name, backbone)}; drop one")
    return {label: [_as_told(one, backbone) for one in classes[name]] for label, name in given_as.items()}


def read_prior(given: str | None) -> list[float] | None:
    """A weight for each class, in the classes' order: numbers with commas between, or a file with one on a line."""
    if given is None:
        return None
    told = list(_lines(Path(given)).values()) if _is_file(given) else given.split(",")
    try:
        weights = [float(one) for one in told]
    except ValueError as error:
        raise ValueError(f"--prior {given}: {error}; give one positive number for each class") from error
    if min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise ValueError(f"--prior {given}: give one positive number for each class, with a finite sum")
    return weights


def _own(backbone: Backbone) -> Sequence[str]:
    if backbone.prompts is not None:
        raise ValueError(
            f"{backbone.name} is told texts and has no classes of its own; give --classes, names or a file"
        )
    if not backbone.class_names:
        raise ValueError(f"{backbone.name} has no class names; give --classes with indices, such as 0,1,2")
    return backbone.class_names


def _as_told(name: str, backbone: Backbone) -> Label:
    """The name, or for a network of class labels that knows no such name its index."""
    named = backbone.prompts is not None or name in (backbone.class_names or ())
    return name if named or not name.isdecimal() else int(name)


def _is_file(given: str) -> bool:
    if Path(given).is_file():
        return True
    if given.lower().endswith(_FILES) and "," not in given:
        raise FileNotFoundError(errno.ENOENT, "no such file", given)
    return False


def _read_lines(path: Path) -> dict[str, list[str]]:
    return _names({f"line {number}": name for number, name in _lines(path).items()}, str(path))


def _names(names: Mapping[str, str], where: str) -> dict[str, list[str]]:
    """Classes that are their own prompts; names: by the place where each stands."""
    _check_distinct(names, where)
    return {name: [name] for name in names.values()}


def _lines(path: Path) -> dict[int, str]:
    """What a text file says by line numbers from 1, without empty lines and those that begin with #."""
    stripped = {number: line.strip() for number, line in enumerate(_text(path).splitlines(), 1)}
    told = {number: line for number, line in stripped.items() if line and not line.startswith("#")}
    if not told:
        raise ValueError(f"{path} is empty; give one entry on each line")
    return told


def _read_csv(path: Path) -> dict[str, list[str]]:
    rows = _rows(path)
    _check_distinct({f"line {line}": row["prompt"] for line, row in rows.items()}, str(path))
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for line, row in rows.items():
        name, number = row["classname"], int(row["classidx"])
        if names.setdefault(number, name) != name:
            raise ValueError(f"{path}, line {line}: classidx {number} is {name!r} here and {names[number]!r} before")
        if numbers.setdefault(name, number) != number:
            raise ValueError(f"{path}, line {line}: {name!r} has classidx {number} here and {numbers[name]} before")
    return {
        names[number]: [row["prompt"] for row in rows.values() if int(row["classidx"]) == number]
        for number in sorted(names)
    }


def _rows(path: Path) -> dict[int, dict[str, str]]:
    """The rows of a .csv of prompts by line numbers, with nothing missing and no blanks around."""
    reader = csv.reader(_text(path).splitlines(), skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; give a table of values with commas") from error
    header, *rows = lines or [(1, [""])]
    if missing := {*_COLUMNS} - {*header[1]}:
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}; give prompt, classname and classidx, or a text file "
            "with a class on each line"
        )
    if not rows:
        raise ValueError(f"{path} is empty below its header; give a row for each prompt")
    return {line: _row(f"{path}, line {line}", header[1], row) for line, row in rows}


def _row(where: str, header: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise ValueError(f"{where}: {len(row)} values for {len(header)} columns; quote what has a comma in it")
    told = dict(zip(header, row, strict=True))
    if empty := [column for column in _COLUMNS if not told[column]]:
        raise ValueError(f"{where}: no {empty[0]}; give each row a prompt, a classname and a classidx")
    if not told["classidx"].isdecimal():
        raise ValueError(f"{where}: classidx {told['classidx']!r}; give a number")
    return told


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def _check_distinct(names: Mapping[str, str], where: str) -> None:
    seen: dict[str, str] = {}
    for place, name in names.items():
        if not name.strip():
            raise ValueError(f"{where} has nothing in {place}; give a name, or leave it out")
        if name in seen:
            raise ValueError(f"{name!r} is twice in {where}, in {seen[name]} and {place}; drop one")
        seen[name] = place
