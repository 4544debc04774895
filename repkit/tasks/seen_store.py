"""SeenStore: what a correspondence's extractors find in a set of images, kept in feature stores and read back."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from repkit.exporting import export
from repkit.extractors import Extractor
from repkit.features import identity_hash
from repkit.listing import list_images
from repkit.matching.positions import position_component
from repkit.mirrored import Mirrored
from repkit.publishing import publish
from repkit.shards import LIST
from repkit.store import FeatureStore
from repkit.tasks.correspondence import Correspondence, Map, Seen

FEW = 10  # images; the mean of fewer still shows what single ones show
_log = logging.getLogger("repkit")

Entry = tuple[Path, str | None]  # an image, and the category that fills templates
# What is done, in which unit -> who is told how far it is.
Watch = Callable[[str, str], AbstractContextManager[Callable[..., None]]]


def unwatched(what: str, unit: str) -> AbstractContextManager[Callable[..., None]]:
    """Nobody is told."""
    return nullcontext(lambda *counts: None)


@dataclass(frozen=True, eq=False)
class Kept:
    """The store of one extractor, and the row of each entry in it; labelled: whether entries differ by category.

    seconds: that an image took, over all runs that measured it.
    """

    store: FeatureStore
    rows: Mapping[Entry, int]
    labelled: bool
    seconds: float | None

    def file(self, image: Path, category: str | None) -> str | None:
        """The sha256 of the file that was read; None for an image that has no features."""
        row = self.rows.get((image, category if self.labelled else None))
        return None if row is None else self.store.table["sha256"][row].as_py()

    def read(self, image: Path, category: str | None) -> dict[str, Any]:
        """The arrays by key, and the row of the table; KeyError for an image that has none."""
        return self.store[self.rows[image, category if self.labelled else None]]


class SeenStore:
    """The images of a correspondence, encoded once and read from stores onto `device`.

    kept: by extractor, of the images and, where flips are tried, of their mirror images.
    """

    def __init__(
        self,
        correspondence: Correspondence,
        kept: Mapping[Extractor, Kept],
        mirrored: Mapping[Extractor, Kept],
        device: str = "cpu",
    ) -> None:
        self.correspondence, self.kept, self.mirrored, self.device = correspondence, kept, mirrored, device
        failures = [row for one in self._all for row in one.store.failures.to_pylist()]
        self._failures = {row["path"]: row["error"] for row in failures}

    @property
    def _all(self) -> tuple[Kept, ...]:
        return *self.kept.values(), *self.mirrored.values()

    @property
    def seconds(self) -> float | None:
        """What encoding an image took, by all extractors; None where that was not measured."""
        found = [one.seconds for one in self._all]
        return None if None in found else sum(one or 0.0 for one in found)

    def why_not(self, image: Path) -> str | None:
        """Why an image has no features; None where it has."""
        return self._failures.get(os.path.abspath(image))

    def seen(self, image: Path, category: str | None = None) -> Seen:
        """What was found in an image; KeyError for one that has no features."""
        found = {extractor: one.read(image, category) for extractor, one in self.kept.items()}
        turned = {extractor: one.read(image, category) for extractor, one in self.mirrored.items()}
        row = next(iter(found.values()))["row"]
        return Seen(self._maps(found), (row["width"], row["height"]), self._maps(turned) if turned else None)

    def _maps(self, found: Mapping[Extractor, Mapping[str, Any]]) -> tuple[tuple[Map, ...], ...]:
        return tuple(
            tuple(torch.from_numpy(found[part.extractor][key]).to(self.device) for key in part.chosen)
            for part in self.correspondence.parts
        )

    def files(self, entries: Iterable[Entry]) -> str | None:
        """A hash of the files that the features of some images came from; None where one has no features."""
        found = [one.file(*entry) for one in self.kept.values() for entry in entries]
        return None if None in found else identity_hash({"files": found})

    def all_files(self) -> str:
        """The same of all images that `positions` are the mean over."""
        return identity_hash({"files": [sorted(one.store.table["sha256"].to_pylist()) for one in self.kept.values()]})

    def positions(self) -> dict[tuple[int, str], Map]:
        """What each part's keys have at each position whatever the image, for `Correspondence(positions=)`."""
        count = min(len(set(one.store.table["sha256"].to_pylist())) for one in self.kept.values())
        if count < FEW:
            _log.warning(
                "positions are the mean over %d images, which still shows what these show; give %d or more", count, FEW
            )
        parts = enumerate(self.correspondence.parts)
        wanted = {(number, key): (part.extractor, key) for number, part in parts for key in part.chosen}
        found = {one: position_component(self._each(*one)) for one in dict.fromkeys(wanted.values())}
        return {place: found[one] for place, one in wanted.items()}

    def _each(self, extractor: Extractor, key: str) -> Iterator[Tensor]:
        return (torch.from_numpy(item[key])[None] for item in self.kept[extractor].store)


def store_seen(
    correspondence: Correspondence,
    entries: Iterable[Entry],
    folder: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 16,
    retry_failed: bool = False,
    device: str = "cpu",
    watch: Watch = unwatched,
) -> SeenStore:
    """Run every extractor once over the images, into a store each below `folder`; what is there is not done again.

    An image is encoded once for each category that it is seen in where a template uses {label}, else once. Beside each
    store NAME is NAME.json, with how many images took how many seconds.
    Raises ValueError where a template needs a category that only some images have, for a folder of other images, and
    for an image that is not the file any more that was read.
    """
    wanted = sorted(set(entries), key=str)
    options = {"pool": "none", "dtype": dtype, "batch_size": batch_size, "retry_failed": retry_failed}

    def kept(run: Extractor, name: str, cond: str | None) -> Kept:
        labelled = cond is not None and "{label}" in cond
        listed = list(dict.fromkeys((image, category if labelled else None) for image, category in wanted))
        table = _listing(listed)
        with watch(f"extract {name}", "images") as progress:
            store = export(table, run, folder / name, cond=cond, progress=progress, **options)  # type: ignore[arg-type]
        seconds = _seconds(store)
        _check_unchanged(store)
        row = {name: number for number, name in enumerate(store.table["id"].to_pylist())}
        ids = dict(zip(listed, table["id"].to_pylist(), strict=True))
        if strange := set(ids.values()) - set(store.images["id"].to_pylist()):
            raise ValueError(f"{store.path} was begun without {min(strange)}; choose another folder")
        rows = {entry: row[name] for entry, name in ids.items() if name in row}
        return Kept(store, rows, labelled, seconds)

    plain, mirrored = {}, {}
    for number, (extractor, template) in enumerate(correspondence.extractors.items()):
        name, cond = f"{number}-{_name(extractor)}", _told(template, wanted)
        plain[extractor] = kept(extractor, name, cond)
        if correspondence.flip:
            mirrored[extractor] = kept(Mirrored(extractor), f"{name}-mirrored", cond)
    return SeenStore(correspondence, plain, mirrored, device)


def _check_unchanged(store: FeatureStore) -> None:
    """Refuse images that were edited or replaced since; only files newer than the store's beginning are read."""
    begun = (store.path / LIST).stat().st_mtime_ns
    for name, expected in zip(*(store.table[column].to_pylist() for column in ("path", "sha256")), strict=True):
        path = Path(name)
        if not path.is_file() or max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) < begun:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{path} has changed since its features were extracted; choose another folder, or delete "
                f"{store.path.parent}"
            )


def _seconds(store: FeatureStore) -> float | None:
    """What an image took; this run's timing is added to what lies beside the store, for the runs that come."""
    path = store.path.with_name(f"{store.path.name}.json")
    images, seconds = json.loads(path.read_text()).values() if path.is_file() else (0, 0.0)
    if store.timing is not None and store.timing.images:
        images, seconds = images + store.timing.images, seconds + store.timing.total
        publish(path.parent, {path.name: json.dumps({"images": images, "seconds": seconds}).encode()})
    return seconds / images if images else None


def _told(template: str | None, entries: Sequence[Entry]) -> str | None:
    """The template, unless it needs categories and there are none."""
    lacking = [image for image, category in entries if category is None]
    if template is None or "{label}" not in template or not lacking:
        return template
    if len(lacking) < len(entries):
        raise ValueError(
            f"{len(lacking)} of {len(entries)} images have no category, which {template!r} needs, the first "
            f"{lacking[0]}; give all pairs a category, or none"
        )
    return None


def _listing(entries: Sequence[Entry]) -> pa.Table:
    """The table that `export` takes; categories are labels, and part of the ids."""
    paths = list(dict.fromkeys(image for image, _ in entries))
    table = list_images(paths)
    row = dict(zip(paths, table.to_pylist(), strict=True))
    rows = [
        row[image] if category is None else {**row[image], "id": f"{category}/{row[image]['id']}", "label": category}
        for image, category in entries
    ]
    return pa.Table.from_pylist(rows, schema=table.schema)


def _name(extractor: Extractor) -> str:
    """What was loaded, as the name of a folder."""
    network = getattr(extractor, "backbone", extractor)
    given = str(extractor.provenance.get("model") or getattr(network, "name", type(extractor).__name__))
    return re.sub(r"[^\w.]+", "-", given.rstrip("/").rpartition("/")[2]).strip("-.")
