"""Samples as files with a list of them, which every command takes that takes images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from repkit.datasets.samples import Samples


def write_list(parts: Sequence[Samples], folder: str | Path) -> Path:
    """Write folder/images.csv with the id, path, label and split of all samples, and return its path.

    Images that are no files are written as PNG to folder/<split>/<index>.png; others stay where they are. Raises
    ValueError for parts of which two have one split, and for an id in two of them.
    """
    splits = [part.split for part in parts]
    if len(set(splits)) < len(splits) or not parts:
        raise ValueError(f"parts with the splits {', '.join(map(str, splits))}; give at least one, each another split")
    out = Path(folder).absolute()
    out.mkdir(parents=True, exist_ok=True)
    tables = [_table(part, out) for part in parts]
    whole = pa.concat_tables(tables)
    twice = [name for name, count in Counter(whole["id"].to_pylist()).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is in two parts; give parts that have different ids, as of one root")
    pyarrow.csv.write_csv(whole, out / "images.csv")
    return out / "images.csv"


def _table(part: Samples, out: Path) -> pa.Table:
    if any(not isinstance(image, Path) for image in part.images):
        part = _written(part, out)
    # Without the root, which lists of several roots do not have in common.
    return part.table().replace_schema_metadata(None).select(["id", "path", "label", "split"])


def _written(part: Samples, out: Path) -> Samples:
    folder = out / (part.split or "images")
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / f"{index:06d}.png" for index in range(len(part)))
    for path, sample in zip(paths, part, strict=True):
        sample["image"].save(path)
    return Samples(part.classes, paths, part.labels, split=part.split, root=out)
