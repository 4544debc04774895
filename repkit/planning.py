"""What an export is going to do: the list, what each image is told, the identity, and where an earlier run stopped."""

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow as pa
import torch

from repkit import __version__
from repkit.backbones.base import Backbone
from repkit.extractors import Extractor
from repkit.features import identity_differences
from repkit.listing import list_images
from repkit.publishing import parquet_bytes, publish
from repkit.shards import LIST, MANIFEST, is_part, manifest_bytes, read_manifest, read_parquet, remove_parts

COLUMNS = ("id", "path", "label", "split", "prompt")
FIELDS = ("label", "split", "id", "prompt")
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "diffusers", "timm")
_log = logging.getLogger("repkit")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """The images of an export, in order. `table` is stored, with paths relative to its root; `paths` are opened."""

    table: pa.Table
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def make_listing(images: str | Path | Sequence[str | Path] | pa.Table) -> Listing:
    """The listing of a folder, list file, image, sequence of paths, or of a table as `list_images` returns it."""
    table = images if isinstance(images, pa.Table) else list_images(images)
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking:
        raise ValueError(f"the table of images has no column {', '.join(lacking)}; make it with listing.list_images")
    if not table.num_rows:
        raise ValueError("the table of images is empty; give at least one row")
    root = (table.schema.metadata or {}).get(b"root", b"").decode()
    paths = table["path"].to_pylist()
    inside = [os.path.relpath(path, root) if root and Path(path).is_relative_to(root) else path for path in paths]
    columns = {**{name: table[name].to_pylist() for name in COLUMNS}, "path": inside}
    schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata={"root": root})
    return Listing(pa.table(columns, schema=schema), [os.path.join(root, path) for path in paths])


def make_conditions(table: pa.Table, cond: str | None) -> list[str] | None:
    """What the network is told of each image: the filled template, else the list's prompts, else None.

    Raises ValueError for a field the template cannot have, one that images lack, and a prompt column filled in part.
    """
    if cond is None:
        prompts = table["prompt"].to_pylist()
        missing = sum(prompt is None for prompt in prompts)
        if 0 < missing < len(prompts):
            raise ValueError(f"{missing} of {len(prompts)} images have no prompt; fill all of that column or none")
        return None if missing else prompts
    fields = _fields(cond)
    unknown = sorted(fields - {*FIELDS})
    if unknown:
        raise ValueError(f"no field {{{unknown[0]}}} for cond={cond!r}; have {', '.join(FIELDS)}")
    for name in sorted(fields):
        if table[name].null_count:
            raise ValueError(
                f"{table[name].null_count} of {table.num_rows} images have no {name}, which cond={cond!r} needs; "
                "give a list with that column, a tree of class folders, or a cond without it"
            )
    columns = {name: table[name].to_pylist() for name in fields}
    rows = ({name: columns[name][index] for name in fields} for index in range(table.num_rows))
    return [_filled(cond, row) for row in rows]


def _fields(cond: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(cond) if name is not None}
    except ValueError as error:
        raise _no_template(cond, error) from error


def _filled(cond: str, row: Mapping[str, str]) -> str:
    try:
        return cond.format(**row)
    except ValueError as error:
        raise _no_template(cond, error) from error


def _no_template(cond: str, error: ValueError) -> ValueError:
    return ValueError(f"cond={cond!r} is no template ({error}); write fields as {{label}} and braces as {{{{ and }}}}")


def check_conditions(extractor: Extractor, conds: list[str] | None) -> None:
    """Raise ValueError, before the run, for a condition that the extractor does not know or cannot take."""
    if conds is None:
        return
    distinct = list(dict.fromkeys(conds))
    backbone = getattr(extractor, "backbone", None)
    if backbone is None:
        extractor(torch.zeros(1, 3, *extractor.resize.shape), distinct[:1], check=False)
        return
    # Without names it takes any text or none: one answers for all, and encoding every prompt here could take long.
    for one in distinct if backbone.class_names else distinct[:1]:
        backbone.condition(one, 1)


def store_identity(extractor: Extractor, table: pa.Table, pool: str, dtype: str, cond: str | None) -> Manifest:
    """What decides the stored values, as JSON data. cond: the template, or that the list has prompts."""
    prompts = cond is None and table["prompt"].null_count == 0
    told = {"column": "prompt"} if prompts else cond
    return {"extractor": _json(extractor.identity), "cond": told, "pool": pool, "dtype": dtype}


def provenance(extractor: Extractor | Backbone, batch_size: int) -> Manifest:
    """What may move the last bits of values and is not part of the identity, and what the extractor was loaded from."""
    device = _device(extractor)
    return {
        "python": platform.python_version(),
        "repkit": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "device": device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        **_json(extractor.provenance),
    }


def _json(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists, every mapping a dict."""
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    return [_json(one) for one in value] if isinstance(value, list | tuple) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(extractor: Any) -> torch.device:
    """Where the extractor computes: its own device, or that of its backbone or first part."""
    while not hasattr(extractor, "device"):
        if hasattr(extractor, "backbone"):
            extractor = extractor.backbone
        elif hasattr(extractor, "parts"):
            extractor = extractor.parts[0].extractor
        elif hasattr(extractor, "extractor"):
            extractor = extractor.extractor
        else:
            return torch.device("cpu")
    return torch.device(extractor.device)


def begin(folder: Path, listing: Listing, wanted: Manifest) -> tuple[Listing, Manifest]:
    """Start a store in an empty folder, or take up the one that is there; its list and its manifest.

    Raises ValueError for a folder with other things in it, a store of another identity or of other images.
    """
    if not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not is_part(path.name) and not _is_own_list(path)]
        if others:
            raise ValueError(f"{folder} is no feature store and not empty (it has {others[0]}); choose another folder")
        remove_parts(folder)
        publish(folder, {LIST: parquet_bytes(listing.table), MANIFEST: manifest_bytes(wanted)})
        return listing, wanted
    manifest = read_manifest(folder)
    remove_parts(folder)
    differences = identity_differences(wanted["identity"], manifest["identity"])
    if differences:
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(differences)}); choose another folder, "
            "or go on with its settings"
        )
    if wanted["shard_size"] != manifest["shard_size"]:
        _log.warning("%s has %d images a shard, and keeps them", folder, manifest["shard_size"])
    for line in identity_differences(wanted["provenance"], manifest["provenance"]):
        _log.warning("%s was begun with another provenance; its last bits may differ: %s", folder, line)
    stored = _stored_listing(folder, listing, prompted=manifest["identity"]["cond"] is not None)
    return stored, manifest


def _is_own_list(path: Path) -> bool:
    """Whether it is what a kill just before the first manifest has left, and not a user's list of the same name."""
    try:
        return path.name == LIST and b"root" in (read_parquet(path).schema.metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _stored_listing(folder: Path, now: Listing, prompted: bool) -> Listing:
    """The list the store was begun with, which stays; ValueError where the images now are others of the same names."""
    table = read_parquet(folder / LIST)
    root = table.schema.metadata[b"root"].decode()
    places = dict(zip(now.table["id"].to_pylist(), now.paths, strict=True))
    ids = table["id"].to_pylist()
    paths = [os.path.join(root, path) for path in table["path"].to_pylist()]
    gone, come = [name for name in ids if name not in places], sorted(places.keys() - {*ids})
    if len(gone) == len(ids):
        raise ValueError(
            f"{folder} is the store of other images: none of its {len(ids)} is given; choose another folder"
        )
    _check_places(folder, {name: (path, places[name]) for name, path in zip(ids, paths, strict=True) if name in places})
    for names, what in ((gone, "went"), (come, "came")):
        if names:
            message = "%d images %s since %s was begun, which keeps its own list (another one needs another folder): %s"
            _log.warning(message, len(names), what, folder, ", ".join(names[:5]))
    _compare_rows(folder, table, now.table, prompted)
    return Listing(table, paths)


def _check_places(folder: Path, places: Mapping[str, tuple[str, str]]) -> None:
    """Raise ValueError where an id's file then and now are not the same: other folders have files of the same names."""
    for before, now in places.values():
        if before != now and os.path.realpath(before) != os.path.realpath(now):
            raise ValueError(
                f"{folder} was made from {before}, not from {now}; choose another folder, "
                "also for the same images at another place"
            )


def _compare_rows(folder: Path, stored: pa.Table, now: pa.Table, prompted: bool) -> None:
    """Labels, splits or prompts that have changed: an error where the network was told of them, else a warning."""
    columns = ["id", "label", "split", "prompt"]
    before = {row["id"]: row for row in stored.select(columns).to_pylist()}
    changed = [row for row in now.select(columns).to_pylist() if row != before.get(row["id"], row)]
    if not changed:
        return
    message = (
        f"{len(changed)} images have another label, split or prompt than when {folder} was begun "
        f"(first: {changed[0]}, was {before[changed[0]['id']]})"
    )
    if prompted:
        raise ValueError(f"{message}; choose another folder, or restore them")
    _log.warning("%s; the stored list stays", message)
