"""TSS (Taniai et al. 2016): pairs of objects with dense correspondence, in three groups: FG3DCar, JODS, PASCAL."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from repkit.datasets.pairs import Pair, checked, chosen

GROUPS = ("FG3DCar", "JODS", "PASCAL")
_MAGIC, _UNKNOWN = 202021.25, 1e9  # of .flo files: what they begin with, and from where on a value says nothing


def read_tss(root: str | Path, *, categories: Sequence[str] | None = None) -> list[Pair]:
    """Both directions of every pair, without points: `dense_points` reads them. categories: groups, None for all.

    root: TSS_CVPR2016, with <group>/<pair>/{image1.png, image2.png, flow1.flo, flow2.flo, flip_gt.txt}. flow1 leads
    from a pixel of image1 to its place in image2, both as they are stored, also where the objects are mirrored.
    Raises FileNotFoundError for what is not there.
    """
    folders = [path for group in GROUPS for path in sorted((Path(root) / group).glob("*/"))]
    if not folders:
        raise FileNotFoundError(f"no TSS in {root}: no folders in {', '.join(GROUPS)}; give the folder TSS_CVPR2016")
    pairs = [_pair(path, *numbers) for path in folders for numbers in ((1, 2), (2, 1))]
    if missing := [pair.flow for pair in pairs if pair.flow is not None and not pair.flow.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(pairs)} flows of {root} are not there: {missing[0]}")
    return checked(chosen(pairs, categories), Path(root))


def dense_points(pair: Pair, step: int = 1) -> Pair:
    """The pair with the points of its flow: every `step`-th pixel in both directions whose correspondence is known."""
    if pair.flow is None:
        raise ValueError(f"pair {pair.id} has no flow; it has {len(pair.source_points)} points of its own")
    flow = read_flow(pair.flow)
    size = (flow.shape[1], flow.shape[0])
    if pair.source_size not in (None, size):
        raise ValueError(
            f"{pair.flow} is for an image of (width, height) {size}, and {pair.source} has {pair.source_size}"
        )
    rows, columns = np.nonzero(np.isfinite(flow[::step, ::step]).all(-1))
    rows, columns = rows * step, columns * step
    source = np.stack([columns, rows], 1).astype(np.float64)
    return replace(pair, source_points=source, target_points=source + flow[rows, columns])


def read_flow(path: str | Path) -> Float32[np.ndarray, "h w 2"]:
    """Where each pixel goes, (dx, dy) in pixels, of a Middlebury .flo file; NaN where that is not known.

    Raises ValueError, naming it, for another or a truncated file.
    """
    content = Path(path).read_bytes()
    if len(content) < 12 or np.frombuffer(content, "<f4", 1)[0] != np.float32(_MAGIC):
        raise ValueError(f"{path} is no .flo file")
    width, height = np.frombuffer(content, "<i4", 2, 4).tolist()
    if len(content) != 12 + 8 * width * height:
        raise ValueError(f"{path} has {len(content)} bytes, and {width}x{height} pixels take {12 + 8 * width * height}")
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    flow[(abs(flow) > _UNKNOWN).any(-1)] = np.nan
    return flow


def flow_bytes(flow: Float32[np.ndarray, "h w 2"]) -> bytes:
    """A Middlebury .flo file of (dx, dy) in pixels, as `read_flow` reads it; NaN is not known."""
    height, width, _ = flow.shape
    known = np.where(np.isnan(flow).any(-1, keepdims=True), np.float32(10 * _UNKNOWN), flow)
    head = np.array(_MAGIC, "<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    return head + known.astype("<f4").tobytes()


def _pair(folder: Path, source: int, target: int) -> Pair:
    group, name = folder.parent.name, folder.name
    mark = folder / "flip_gt.txt"
    mirrored = mark.is_file() and mark.read_text().strip() == "1"
    none = np.empty((0, 2))
    images = (folder / f"image{source}.png", folder / f"image{target}.png")
    flow = folder / f"flow{source}.flo"
    return Pair(f"{group}/{name}/{source}to{target}", *images, none, none, (), group, mirrored=mirrored, flow=flow)
