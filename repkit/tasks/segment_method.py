"""What a way to segment is: what it learns beforehand, and what it makes of one image's maps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from repkit.tasks.segment_source import Maps, Source

Tell = Callable[[int, int], None]
Learned = dict[str, Tensor]
Masks = Sequence[UInt8[Tensor, "H W"]]


class Method(ABC):
    """A way to segment: a dataclass whose fields are its settings."""

    name: ClassVar[str]
    supervised: ClassVar[bool] = False

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result beside the features and masks, as JSON-ready data."""
        return {"head": self.name, **asdict(self)}  # type: ignore[call-overload]

    def check(self, source: Source) -> None:  # noqa: B027
        """Raise ValueError for maps that the method cannot read, before anything is done."""

    def learn(self, source: Source, rows: Sequence[int], masks: Masks, classes: int, tell: Tell) -> Learned:
        """What is learned, tensors by name: of a supervised method from images and masks, else from all images."""
        return {}

    def ready(self, source: Source, learned: Learned, classes: int) -> None:  # noqa: B027
        """Get ready to segment with what was learned."""

    @abstractmethod
    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        """The label of every pixel of an image, given where its pixels are in its maps."""

    def uncertain(
        self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]
    ) -> tuple[Int[Tensor, "H W"], Float[Tensor, "H W"] | None]:
        """The same, and how uncertain it is where the method knows: 0 is sure, 1 as uncertain as can be."""
        return self.segment(source, maps, places), None


def batch(maps: Maps) -> dict[str, Tensor]:
    """An image's maps as a batch of one."""
    return {key: one[None].float() for key, one in maps.items()}


def device_of(maps: Mapping[Any, Tensor]) -> torch.device:
    """Where maps are."""
    return next(iter(maps.values())).device
