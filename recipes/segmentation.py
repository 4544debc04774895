"""Segmentation: a head on frozen maps gives every pixel a class."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn

from repkit.heads.dense_training import segmentation_loss
from repkit.heads.fpn import Fpn
from repkit.heads.linear_segmentation import LinearSegmentation
from repkit.heads.miou import count_pixels, mean_iou
from repkit.heads.places import by_stride
from repkit.recipes.feature_data import Batch, FeatureData
from repkit.recipes.head_training import HeadTraining
from repkit.recipes.optimising import Optimising


class Segmentation(HeadTraining):
    """Segmentation by cross-entropy over the pixels that count; scored by mean IoU over the whole split.

    Args:
        head: linear (batch statistics, then a 1x1 convolution) or fpn
        width: channels of the feature pyramid
        optimising: the optimizer and its learning rates, each with a head of its own
        seed: of the heads' first weights
    """

    def __init__(
        self,
        head: Literal["linear", "fpn"] = "linear",
        width: int = 128,
        optimising: Optimising = Optimising(name="adamw", lrs=[1e-3]),  # noqa: B008 - frozen
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimising, seed, {"head": head, "width": width, "optimising": asdict(optimising), "seed": seed}
        )
        self.head, self.width = head, width

    def build(self, data: FeatureData, rates: Sequence[float]) -> dict[str, tuple[float, nn.Module]]:
        self.strides, self.classes = data.strides, len(data.classes)
        channels: dict[int, int] = {}
        for key, size in data.sizes.items():
            channels[self.strides[key]] = channels.get(self.strides[key], 0) + size[0]
        return {f"{self.head}, lr {lr:g}": (lr, self._made(channels)) for lr in rates}

    def losses(self, batch: Batch) -> list[Tensor]:
        return [segmentation_loss(logits, batch["mask"]) for logits in self._logits(batch)]

    def measures(self, batch: Batch) -> Float64[Tensor, "m k_and_1 k"]:
        """Of each head the pixels by true and found class."""
        counts = (batch["index"] >= 0).tolist()
        found = []
        for logits in self._logits(batch):
            enlarged = F.interpolate(logits, batch["mask"].shape[-2:], mode="bilinear", align_corners=False)
            pairs = zip(enlarged.argmax(1).cpu().numpy(), batch["mask"].cpu().numpy(), counts, strict=True)
            tables = [count_pixels(labels, truth, self.classes) for labels, truth, one in pairs if one]
            empty = torch.zeros(self.classes + 1, self.classes, dtype=torch.float64)
            found.append(sum((torch.from_numpy(table) for table in tables), empty))
        return torch.stack(found).to(self.device)

    def scored(self, total: Float64[Tensor, "m k_and_1 k"]) -> dict[str, list[float]]:
        tables = total.long().cpu().numpy()
        right = [float(table[:-1].trace() / max(table[:-1].sum(), 1)) for table in tables]
        return {"miou": [mean_iou(table).mean for table in tables], "pixel_accuracy": right}

    def _made(self, channels: dict[int, int]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.head == "fpn":
                return Fpn(channels, self.classes, width=self.width)
            return LinearSegmentation(channels, self.classes)

    def _logits(self, batch: Batch) -> list[Tensor]:
        levels = by_stride(batch["features"], self.strides)
        return [head(levels) for head in self.heads]
