"""Segmentation of many images by the features they have: masks in files, and their scores where the truth is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from repkit.features import identity_hash
from repkit.images import FORMATS
from repkit.publishing import publish
from repkit.tasks.mask_files import Labels
from repkit.tasks.mask_folder import Masks, file_hash, kept, mask_path, root_of, write_mask
from repkit.tasks.segment_method import Learned, Method, Tell
from repkit.tasks.segment_source import Source
from repkit.tasks.segment_truth import Truth, cluster_labels, in_frame

HEAD, MASKS, UNCERTAINTY = "head.safetensors", "masks", "uncertainty"
STEPS = 65535  # from sure to as uncertain as can be
Progress = Callable[[int, int, int], None]  # images done, of how many, and failed


@dataclass(frozen=True)
class Segmented:
    """The masks of images, what the method learned, and the rows it learned from; see `uncertainty` for the rest."""

    masks: Masks
    learned: Learned
    trained: list[int] = field(default_factory=list)

    def uncertainty(self, name: str) -> Float[np.ndarray, "H W"] | None:
        """How uncertain each pixel of an image is, from 0 to 1, where the method knows; see `Method.uncertain`."""
        path = mask_path(self.masks.folder.parent / UNCERTAINTY, name)
        if not path.exists():
            return None
        with Image.open(path, formats=FORMATS) as picture:
            return np.asarray(picture).astype(np.float64) / STEPS


def segment(
    source: Source,
    method: Method,
    out: Path,
    *,
    truth: Truth | None = None,
    learning: Tell | None = None,
    progress: Progress | None = None,
) -> Segmented:
    """Masks of all images in out/masks, and of an ensemble how uncertain they are in out/uncertainty, 16 bits a pixel.

    truth: what a supervised method learns from. What it learned is in out/head.safetensors.
    What is done stays: killed at any moment, the same call goes on from there, to the same bytes. An image that cannot
    be read, or whose features are not finite, has no mask. Raises ValueError for a supervised method without masks, and
    for a folder of other settings, images' places or training masks.
    """
    if method.supervised and truth is None:
        raise ValueError(f"the head {method.name} learns from masks; give those of a few images")
    used = truth if method.supervised else None
    labels, ids = used.labels if used else cluster_labels(), source.ids
    check_names(ids, out)
    method.check(source)
    with kept(out, _settings(source, method, used)):
        learned = _learned(source, method, used, out, learning or (lambda *_: None))
        method.ready(source, learned, len(labels))
        left = [row for row, name in enumerate(ids) if not mask_path(out / MASKS, name).exists()]
        failures, tell = dict[str, str](), progress or (lambda *_: None)
        tell(len(ids) - len(left), len(ids), 0)
        for done, row in enumerate(left, len(ids) - len(left) + 1):
            if problem := _segment_one(source, method, row, labels, out):
                failures[ids[row]] = problem
            tell(done, len(ids), len(failures))
    masks = Masks(out / MASKS, labels, [name for name in ids if name not in failures], failures)
    return Segmented(masks, learned, used.rows if used else [])


def check_names(ids: Sequence[str], out: Path) -> None:
    """Raise ValueError where masks would overwrite one another, or lie outside the folder."""
    places: dict[Path, str] = {}
    for name in ids:
        path = mask_path(out / MASKS, name)
        if not path.resolve().is_relative_to((out / MASKS).resolve()):
            raise ValueError(f"{name} lies outside the folder of the list, so its mask has no place; give it an id")
        if path in places:
            raise ValueError(f"{name} and {places[path]} would both be {path}; rename one")
        places[path] = name


def _settings(source: Source, method: Method, truth: Truth | None) -> dict[str, Any]:
    """What decides masks, beside the images' own pixels."""
    told: dict[str, Any] = {"task": "segment", **method.settings, "features": dict(source.identity)}
    told["images"] = root_of(source.listing) or identity_hash({"paths": source.listing["path"].to_pylist()})
    if truth is not None:
        hashes = {source.ids[row]: file_hash(mask_path(truth.folder, source.ids[row])) for row in truth.rows}
        told |= {"labels": list(truth.labels.values), "masks": identity_hash(hashes)}
    return told


def _learned(source: Source, method: Method, truth: Truth | None, out: Path, tell: Tell) -> Learned:
    """What the method has learned in an earlier run, or learns now."""
    if (out / HEAD).exists():
        return load_file(out / HEAD)
    ids, rows = source.ids, truth.rows if truth else range(source.listing.num_rows)
    masks = [in_frame(source, truth.read(ids[row], source.size(row))) for row in rows] if truth else []
    found = method.learn(source, rows, masks, len(truth.labels) if truth else 0, tell)
    learned = {name: value.detach().cpu().contiguous() for name, value in found.items()}
    if learned:
        publish(out, {HEAD: save(learned)})
    return learned


def _segment_one(source: Source, method: Method, row: int, labels: Labels, out: Path) -> str | None:
    """Put an image's files in place, its mask last; or why there is none."""
    name, path = source.ids[row], source.listing["path"][row].as_py()
    try:
        maps, size = source.maps(row)
        found, uncertain = method.uncertain(source, maps, source.places(size))
    except (OSError, ValueError, FloatingPointError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return text.removeprefix(f"{path}: ").splitlines()[0]
    if uncertain is not None:
        place = mask_path(out / UNCERTAINTY, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        publish(place.parent, {place.name: _png(uncertain)})
    write_mask(out / MASKS, name, found.cpu().numpy(), labels)
    return None


def _png(uncertain: Float[Tensor, "H W"]) -> bytes:
    content = BytesIO()
    Image.fromarray((uncertain.cpu().double() * STEPS).round().numpy().astype(np.uint16)).save(content, "PNG")
    return content.getvalue()
