"""A folder of masks: one PNG an image, under the image's name, and what they were made with."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from repkit.images import decode, decoder_identity
from repkit.publishing import made, publish, sha256
from repkit.shards import locked
from repkit.tasks.correspondence import Correspondence, Seen
from repkit.tasks.mask_files import Index, Labels, read_mask_as
from repkit.tasks.resuming import claim

OVERLAY = "overlay.png"
Progress = Callable[[int, int, int], None]  # images done, of how many, and failed


@dataclass(frozen=True)
class Masks:
    """The masks in a folder: the ids of images that have one, in order, and by id why others have none."""

    folder: Path
    labels: Labels
    ids: list[str]
    failures: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Index:
        """An image's mask, as numbers of labels."""
        return read_mask_as(mask_path(self.folder, name), self.labels)


def mask_path(folder: Path, name: str) -> Path:
    """Where the mask of an image is, by the image's id."""
    return folder / Path(name).with_suffix(".png")


def root_of(listing: pa.Table) -> str:
    """The real path of the folder that ids are relative to; "" where the table does not say."""
    root = (listing.schema.metadata or {}).get(b"root", b"").decode()
    return os.path.realpath(root) if root else ""


def check_names(listing: pa.Table, mask: Path, out: Path) -> None:
    """Raise ValueError where masks would overwrite one another or be taken for images by the next run."""
    places: dict[Path, str] = {out / OVERLAY: "the picture of all masks"}
    for name in listing["id"].to_pylist():
        path = mask_path(out, name)
        if not path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{name} lies outside the folder of the list, so its mask has no place; give it an id")
        if path in places:
            raise ValueError(f"{name} and {places[path]} would both be {path}; rename one")
        places[path] = name
    real = {os.path.realpath(path): path for path in listing["path"].to_pylist()}
    if found := real.get(os.path.realpath(mask)):
        raise ValueError(f"the mask {found} is among the images; keep it in another folder")


def refuse_inside(images: Path, out: Path) -> None:
    """Raise ValueError for an output folder among the images, which the next run would take for images as well."""
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"{out} lies in {images}, where masks would be taken for images; choose another --out")


@contextmanager
def kept(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """A folder for masks that only these settings may fill, by one process at a time."""
    with made(out), locked(out):
        claim(out, settings, "masks")
        yield


def settings_of(correspondence: Correspondence, listing: pa.Table, **more: Any) -> dict[str, Any]:
    """What decides masks, beside the images' own pixels."""
    identity = {name: value for name, value in correspondence.identity.items() if name not in ("method", "flip")}
    return {**more, "images": root_of(listing), "correspondence": identity, "decoder": decoder_identity()}


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    return sha256(path.read_bytes())


def look(path: str | Path, correspondence: Correspondence, label: str | None) -> Seen | str:
    """What the extractors find in a file, one at a time, so that no other changes a bit; or why there is nothing."""
    try:
        picture = decode(Path(path))
    except (OSError, ValueError) as error:
        return _reason(error, path)
    try:
        return correspondence.see([picture], label)[0]
    except FloatingPointError as error:
        return _reason(error, path)


def _reason(error: Exception, path: str | Path) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(f"{path}: ").splitlines()[0]


def write_mask(folder: Path, name: str, index: Index, labels: Labels) -> None:
    """Put an image's mask in place, whole or not at all."""
    path = mask_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path.parent, {path.name: labels.encode(index)})
