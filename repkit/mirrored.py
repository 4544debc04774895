"""Mirrored: an extractor's features of images turned left to right."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from repkit.backbones.conditions import Cond
from repkit.backbones.prompts import Told
from repkit.extractors import Extractor, Images, prepare
from repkit.features import Features, Identity


class Mirrored(Extractor):
    """Images -> what `extractor` finds in their mirror images, which is not the mirror image of what it finds in them.

    Flip alignment matches an object by whichever of the two looks more like the other object.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.resize, self.blocks, self.provenance = extractor.resize, extractor.blocks, extractor.provenance

    def __call__(self, images: Images, cond: Cond = None, *, grad: bool = False, check: bool = True) -> Features:
        """Extract every key of the mirrored images; options as the extractor's own."""
        batch = prepare(images, self.resize, images.device if isinstance(images, Tensor) else torch.device("cpu"))
        found = self.extractor(batch.images.flip(-1), cond, grad=grad, check=check)
        mask = None if batch.mask is None else batch.mask.flip(-1)
        return Features(found.maps, found.size, mask, {**found.identity, "mirrored": True})

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """(c, h, w) of each key's map for images that went through `resize`."""
        return self.extractor.shapes

    @property
    def identity(self) -> Identity:
        """The extractor's, with the word that its images are mirrored."""
        return {**self.extractor.identity, "mirrored": True}

    def learn(self, conds: Iterable[Cond] | None = None, told: Told | None = None) -> None:
        """Have the extractor encode what images will be told."""
        self.extractor.learn(conds, told)
