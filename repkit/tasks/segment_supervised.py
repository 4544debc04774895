"""Segmentation learned from a handful of masks: heads on whole maps, and pixel classifiers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repkit.heads.dense_training import DenseRule, train_dense
from repkit.heads.fpn import Fpn
from repkit.heads.linear_segmentation import LinearSegmentation
from repkit.heads.pixel_bank import PixelBank
from repkit.heads.pixel_training import PixelRule, drop_small, train_pixels
from repkit.heads.pixels import NETWORKS, PixelEnsemble
from repkit.heads.places import by_stride
from repkit.matching.propagation import likeliest
from repkit.tasks.segment_method import Learned, Masks, Method, Tell, batch, device_of
from repkit.tasks.segment_source import Maps, Source


@dataclass
class Dense(Method):
    """A head that gives logits for whole maps."""

    rule: DenseRule = field(default_factory=DenseRule)
    seed: int = 0
    supervised: ClassVar[bool] = True

    @abstractmethod
    def make(self, channels: Mapping[int, int], classes: int) -> nn.Module:
        """The head for maps of so many channels by stride."""

    def learn(self, source: Source, rows: Sequence[int], masks: Masks, classes: int, tell: Tell) -> Learned:
        images = [by_stride(batch(source.maps(row)[0]), source.strides) for row in rows]
        levels = {stride: torch.cat([image[stride] for image in images]) for stride in images[0]}
        head = self._made(source, classes).to(device_of(levels))
        train_dense(head, levels, torch.stack(list(masks)), self.rule, seed=self.seed, progress=tell)
        return dict(head.state_dict())

    def ready(self, source: Source, learned: Learned, classes: int) -> None:
        self.head = self._made(source, classes)
        self.head.load_state_dict(learned)
        self.head.eval()

    def _made(self, source: Source, classes: int) -> nn.Module:
        channels: dict[int, int] = {}
        for key, (count, _, _) in source.shapes.items():
            channels[source.strides[key]] = channels.get(source.strides[key], 0) + count
        with torch.random.fork_rng(devices=[]):  # torch's generator is the caller's
            torch.manual_seed(self.seed)
            return self.make(channels, classes)

    @torch.no_grad()
    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        levels = by_stride(batch(maps), source.strides)
        logits = self.head.to(device_of(levels))(levels)[0]
        return likeliest(logits, places.to(logits))


@dataclass
class Linear(Dense):
    """A linear layer on every pixel's channels."""

    name: ClassVar[str] = "linear"

    def make(self, channels: Mapping[int, int], classes: int) -> nn.Module:
        return LinearSegmentation(channels, classes)


@dataclass
class Pyramid(Dense):
    """A feature pyramid."""

    width: int = 128
    name: ClassVar[str] = "fpn"

    def make(self, channels: Mapping[int, int], classes: int) -> nn.Module:
        return Fpn(channels, classes, width=self.width)


@dataclass
class Pixels(Method):
    """An ensemble of pixel classifiers; small: a class with fewer pixels in an image is not learned from it."""

    rule: PixelRule = field(default_factory=PixelRule)
    networks: int = NETWORKS
    small: int = 0
    seed: int = 0
    name: ClassVar[str] = "mlp"
    supervised: ClassVar[bool] = True

    def learn(self, source: Source, rows: Sequence[int], masks: Masks, classes: int, tell: Tell) -> Learned:
        device = device_of(source.maps(rows[0])[0])
        bank = PixelBank(len(rows), list(source.shapes.values()), device=device)
        for number, row in enumerate(rows):
            bank.fill(number, list(source.maps(row)[0].values()))
        ensemble, kept = self._made(source, classes).to(device), drop_small(torch.stack(list(masks)), self.small)
        steps = train_pixels(ensemble, bank, kept, self.rule, seed=self.seed, progress=tell)
        return {**ensemble.state_dict(), "steps": torch.tensor(steps)}

    def ready(self, source: Source, learned: Learned, classes: int) -> None:
        self.ensemble = self._made(source, classes)
        self.ensemble.load_state_dict({name: value for name, value in learned.items() if name != "steps"})

    def _made(self, source: Source, classes: int) -> PixelEnsemble:
        channels = [count for count, _, _ in source.shapes.values()]
        return PixelEnsemble(channels, classes, networks=self.networks, seed=self.seed)

    def segment(self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]) -> Int[Tensor, "H W"]:
        return self.uncertain(source, maps, places)[0]

    def uncertain(
        self, source: Source, maps: Maps, places: Float[Tensor, "H W 2"]
    ) -> tuple[Int[Tensor, "H W"], Float[Tensor, "H W"] | None]:
        size, device = places.shape[:2], device_of(maps)
        self.ensemble.to(device)
        labels, nats = self.ensemble.predict([one.float() for one in maps.values()], places.flatten(0, 1).to(device))
        most = log(max(2, min(self.networks, self.ensemble.classes)))
        return labels.view(size), (nats / most).clamp(0, 1).view(size)


METHODS: dict[str, type[Method]] = {one.name: one for one in (Linear, Pixels, Pyramid)}
