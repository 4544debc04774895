"""Label propagation: the mask of a video's first frame carried from frame to frame."""

import json
import logging
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from repkit.features import identity_hash
from repkit.listing import list_images
from repkit.matching.featuremap import FeatureMap
from repkit.matching.propagation import Labelled, check_rule, propagate_labels
from repkit.publishing import publish
from repkit.tasks.correspondence import Correspondence, Seen
from repkit.tasks.mask_cells import labelled, to_pixels
from repkit.tasks.mask_files import Index, Labels, read_mask_of
from repkit.tasks.mask_folder import (
    Masks,
    Progress,
    check_names,
    file_hash,
    kept,
    look,
    mask_path,
    settings_of,
    write_mask,
)

STATE = "context.safetensors"
_log = logging.getLogger("repkit")


@dataclass(frozen=True)
class Rule:
    """How labels go on; the defaults are those of DIFT's evaluation of Stable Diffusion on DAVIS.

    top_k, temperature, radius: as in `propagate_labels`; a radius of None is no limit. context: how many frames before
    the one at hand give their labels, beside the first frame. stretch: as in `likeliest`.
    """

    top_k: int = 15
    temperature: float = 0.2
    radius: int | None = 15
    context: int = 28
    stretch: bool = True

    def __post_init__(self) -> None:
        check_rule(self.top_k, self.temperature, self.radius)
        if self.context < 0:
            raise ValueError(f"context={self.context}; give a number of frames of 0 or more")


@dataclass
class _Past:
    """What is done of a video: the frames' files by their hashes, why some have no mask, and the last ones' labels."""

    hashes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    shares: dict[int, Tensor] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """How many frames."""
        return len(self.hashes)


def list_frames(source: Path) -> pa.Table:
    """The frames of one video: a list in its order, a folder by the numbers in the names, so that 10 comes after 9.

    Raises ValueError for a folder of several videos, and as `list_images` does.
    """
    frames = list_images(source, splits=False)
    if not source.is_dir():
        return frames
    ids = frames["id"].to_pylist()
    if len(folders := sorted({str(Path(name).parent) for name in ids})) > 1:
        raise ValueError(f"{source} has images in {', '.join(folders[:3])}; give the folder of one video")
    return frames.take(pa.array(sorted(range(len(ids)), key=lambda row: _numbered(ids[row]))))


def _numbered(name: str) -> list[tuple[str, int]]:
    """A name as its words and numbers, which compare as such."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", name)]


def propagate_mask(
    frames: pa.Table,
    mask: Path,
    correspondence: Correspondence,
    out: Path,
    rule: Rule | None = None,
    *,
    label: str | None = None,
    progress: Progress | None = None,
) -> Masks:
    """Masks of a video's frames, in the order of the table, from that of the first.

    A frame's cell gets the mean labels of the most similar cells of the first frame and of the frames before it, whose
    labels are shares as they were found: the label propagation of Jabri et al. 2020 and DINO (Caron et al. 2021). Their
    code takes for a cell the nearest pixel of the first mask, this the mean over the cell; it enlarges the result to
    the size that the network saw and that to the frame, this at once to the frame; its frames have a shorter side of
    480 pixels, where this resizes as the correspondence says.

    Each frame is looked at once. What is done stays: killed at any moment, the same call goes on from there, to the
    same bytes. A frame that cannot be read has no mask, and gives no labels. Nothing is reduced by the common
    principal components of two images, nor mirrored, whatever the correspondence says.
    label: fills the templates of what the networks are told. Raises ValueError for a mask of another size than the
    first frame or without objects, and for a folder of other settings or frames.
    """
    rule, correspondence = rule or Rule(), _each_alone(correspondence)
    video = _Video(frames["id"].to_pylist(), frames["path"].to_pylist(), correspondence, label)
    index, labels = read_mask_of(Path(video.paths[0]), mask)
    check_names(frames, mask, out)
    hashes = {"mask": file_hash(mask), "first": file_hash(Path(video.paths[0]))}
    settings = settings_of(correspondence, frames, task="propagate", **asdict(rule), label=label, **hashes)
    with kept(out, settings):
        past = _read(out, video)
        if past.done < len(video.ids):
            _go_on(video, past, index, labels, rule, out, progress or (lambda *_: None))
    return Masks(out, labels, [name for name in video.ids if name not in past.failures], past.failures)


def _each_alone(correspondence: Correspondence) -> Correspondence:
    if not correspondence.apart:
        _log.warning("frames are compared without the principal components of pairs, which a video does not have")
    return correspondence.replaced(flip=False, pca=None)


@dataclass(frozen=True)
class _Video:
    """A video's frames, and what looks at them."""

    ids: list[str]
    paths: list[str]
    correspondence: Correspondence
    label: str | None

    def look(self, number: int) -> Seen | str:
        return look(self.paths[number], self.correspondence, self.label)

    def features(self, number: int) -> FeatureMap:
        """Those of a frame that was read before."""
        seen = self.look(number)
        if isinstance(seen, str):
            raise ValueError(f"{self.paths[number]}: {seen}; the next frames need it")
        return self.correspondence.fuse(seen)[0]


def _go_on(video: _Video, past: _Past, index: Index, labels: Labels, rule: Rule, out: Path, tell: Progress) -> None:
    """Make the masks that are not done, and keep after each what the next ones need."""
    carry = partial(propagate_labels, top_k=rule.top_k, temperature=rule.temperature, radius=rule.radius)
    first = labelled(video.features(0), index, len(labels), video.correspondence)
    earlier = ((number, Labelled(video.features(number), shares)) for number, shares in past.shares.items())
    context = deque(earlier, maxlen=rule.context)
    tell(past.done, len(video.ids), len(past.failures))
    for number in range(past.done, len(video.ids)):
        hashed = _hash(video.paths[number])
        if number == 0:
            write_mask(out, video.ids[0], index, labels)
        elif isinstance(seen := video.look(number), str):
            past.failures[video.ids[number]] = seen
        else:
            features = video.correspondence.fuse(seen)[0]
            shares = carry(features, [first, *(one for _, one in context)])
            context.append((number, Labelled(features, shares)))
            picture = to_pixels(shares, seen.size, video.correspondence, stretch=rule.stretch)
            write_mask(out, video.ids[number], picture, labels)
        past.hashes.append(hashed)
        past.shares = {number: one.labels for number, one in context}
        _write(out, past, video.ids)
        tell(past.done, len(video.ids), len(past.failures))


def _hash(path: str) -> str:
    """Of a file's bytes; of what cannot be opened, nothing."""
    try:
        return file_hash(Path(path))
    except OSError:
        return ""


def _write(out: Path, past: _Past, ids: Sequence[str]) -> None:
    told = {"files": past.hashes, "ids": identity_hash({"ids": ids[: past.done]}), "failures": past.failures}
    arrays = {f"{number:08d}": shares.float().cpu().contiguous() for number, shares in past.shares.items()}
    publish(out, {STATE: save(arrays, {"repkit": json.dumps(told)})})


def _read(out: Path, video: _Video) -> _Past:
    """What is done in the folder; ValueError where that was of other frames, or frames or masks are others since."""
    if not (out / STATE).exists():
        return _Past()
    with safe_open(out / STATE, framework="pt") as file:
        told = json.loads(file.metadata()["repkit"])
        shares = {int(key): file.get_tensor(key) for key in sorted(file.keys())}
    past = _Past(told["files"], told["failures"], shares)
    done = video.ids[: past.done]
    if told["ids"] != identity_hash({"ids": done}):
        raise ValueError(f"{out} has masks of other frames than the first {past.done} here; choose another --out")
    for name, path, hashed in zip(done, video.paths, past.hashes, strict=False):
        if name not in past.failures and not mask_path(out, name).exists():
            raise ValueError(f"{mask_path(out, name)} is gone, which was done; delete {out} to begin again")
        if _hash(path) != hashed:
            raise ValueError(f"{path} is another file since it was done, and later masks come from it; delete {out}")
    return past
