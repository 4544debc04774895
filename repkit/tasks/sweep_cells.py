"""The cells that a sweep compares, blocks at times and poolings, and what a cell gives and costs."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

from repkit.backbones.base import Backbone
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.pooling import pooled_shape
from repkit.tasks.extraction_cost import image_flops


@dataclass(frozen=True)
class Cell:
    """A block at a time, pooled.

    key: its tap. time: as it was asked for; t: in the network's own units; both None for networks that know no time.
    logsnr: None where there is no noise. dim: values of an image. flops: share of a full forward, encoding apart.
    """

    key: str
    block: str
    time: str | None
    t: float | None
    logsnr: float | None
    pool: str
    channels: int
    dim: int
    flops: float

    @property
    def name(self) -> str:
        """The tap and its pooling."""
        return f"{self.key} {self.pool}"

    @property
    def bytes(self) -> int:
        """Of an image's features, in float32."""
        return 4 * self.dim

    def to_json(self) -> dict[str, Any]:
        """The cell as JSON-ready data."""
        return {**asdict(self), "bytes": self.bytes}


def make_cells(extractor: Extractor, pools: Sequence[str]) -> dict[str, Cell]:
    """Every cell by its name: pooling by pooling, in the order of the taps.

    Raises ValueError for a pooling that does not exist or keeps maps, and for one that is named twice.
    """
    if not pools or "none" in pools or len({*pools}) < len(pools):
        raise ValueError(f"poolings {', '.join(pools) or '(none)'}; give mean, max, gem or NxN such as 2x2, each once")
    shares = flops_shares(extractor)
    cells = []
    for pool in pools:
        for key, shape in extractor.shapes.items():
            block, time, resolved = _address(extractor, key)
            (dim,) = pooled_shape(shape, pool)
            level = resolved.get("t"), resolved.get("logsnr")
            cells.append(Cell(key, block, time, *level, pool, shape[0], dim, shares[block]))
    return {cell.name: cell for cell in cells}


def _address(extractor: Extractor, key: str) -> tuple[str, str | None, Mapping[str, Any]]:
    """The block and the time of a key, and what the time was resolved to."""
    if not isinstance(extractor, DiffusionExtractor):
        return key, None, {}
    tap = extractor.taps[key]
    return tap.block, str(tap.time), extractor.identity["taps"][key]


def flops_shares(extractor: Extractor) -> dict[str, float]:
    """For each tapped block, the share of a full forward's FLOPs that is spent when it is reached."""
    if isinstance(extractor, DiffusionExtractor):
        blocks = list(dict.fromkeys(tap.block for tap in extractor.taps.values()))
        costs = extractor.backbone.costs(blocks, *extractor.resize.shape)
        return {block: cost.flops for block, cost in costs.items()}
    assert isinstance(extractor, DinoExtractor)
    spent = {key: _flops(extractor, key) for key in extractor.blocks}
    return {key: one / _flops(extractor, "norm") for key, one in spent.items()}


def _flops(extractor: DinoExtractor, key: str) -> int:
    return image_flops(DinoExtractor(extractor.model, [key], resize=extractor.resize)) or 0


def split_levels(extractor: Extractor) -> list[Extractor]:
    """An extractor for each noise level, with all of its taps: one forward for an image."""
    if not isinstance(extractor, DiffusionExtractor):
        return [extractor]
    levels = dict.fromkeys(extractor.levels.values())
    groups = [[key for key, at in extractor.levels.items() if at == level] for level in levels]
    return [narrowed(extractor, keys) for keys in groups]


def narrowed(extractor: Extractor, keys: Sequence[str], seed: int | None = None) -> Extractor:
    """The extractor with some of its taps only, and perhaps with other noise."""
    if isinstance(extractor, DinoExtractor):
        return DinoExtractor(extractor.model, keys, resize=extractor.resize)
    assert isinstance(extractor, DiffusionExtractor)
    other = copy(extractor)  # to build one anew would run the network on shapes
    other.seed = extractor.seed if seed is None else seed
    other.taps = {key: extractor.taps[key] for key in keys}
    other.levels = {key: extractor.levels[key] for key in keys}
    other.blocks = {key: extractor.blocks[key] for key in keys}
    vars(other).pop("shapes", None)  # which are kept once they are known
    return other


def on_backbone(extractor: DiffusionExtractor, backbone: Backbone) -> DiffusionExtractor:
    """The same taps and settings of another backbone, without compiled blocks, which would keep the old weights."""
    return DiffusionExtractor(
        backbone,
        list(extractor.taps),
        resize=extractor.resize,
        cond=extractor.cond,
        draws=extractor.draws,
        seed=extractor.seed,
        noise=extractor.noise,
        discard=extractor.discard,
    )
