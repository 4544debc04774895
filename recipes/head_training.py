"""HeadTraining: what training of heads on frozen features has in common, whatever their task."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from repkit.recipes.feature_data import Batch, FeatureData
from repkit.recipes.optimising import Optimising


class HeadTraining(LightningModule):
    """Heads in training at once, each with a learning rate of its own, on features that a FeatureData gives.

    `heads` are all there is in a checkpoint: the model that makes the features belongs to the data. `names` are those
    of the heads; `scores` is what the last validation, after `scored_at` steps, found of each, by the measure's name.
    """

    def __init__(self, optimising: Optimising, seed: int, hyperparameters: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters)
        self.optimising, self.seed = optimising, seed
        self.heads = nn.ModuleList()
        self.names: list[str] = []
        self.scores: dict[str, list[float]] = {}
        self.scored_at = -1
        self._total: Tensor | None = None

    @abstractmethod
    def build(self, data: FeatureData, rates: Sequence[float]) -> dict[str, tuple[float, nn.Module]]:
        """The heads by name, each with its learning rate."""

    @abstractmethod
    def losses(self, batch: Batch) -> Sequence[Tensor]:
        """The mean loss of each head over a batch."""

    @abstractmethod
    def measures(self, batch: Batch) -> Float64[Tensor, "..."]:
        """What can be added up over the batches of an evaluation, over samples that count only."""

    @abstractmethod
    def scored(self, total: Float64[Tensor, "..."]) -> dict[str, list[float]]:
        """The scores of each head by the added measures; the first decides among the heads, the larger the better."""

    @property
    def data(self) -> FeatureData:
        """Where the features come from."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def best(self) -> int:
        """The place of the head that the last validation found best; the first among equals."""
        scores = next(iter(self.scores.values()), [0.0])
        return scores.index(max(scores))

    def setup(self, stage: str) -> None:
        """Build the heads, once the shapes of the features are known."""
        if not self.names:
            built = self.build(self.data, self.optimising.rates(self.data.batch))
            self.names, self.lrs = list(built), [lr for lr, _ in built.values()]
            self.heads.extend(head for _, head in built.values())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimising.optimizer(zip(self.lrs, self.heads, strict=True))
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optimising.share(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        losses = torch.stack(list(self.losses(batch)))
        self.log("train_loss", losses.detach().mean(), prog_bar=True)
        return losses.sum()  # no head feels another

    def on_validation_epoch_start(self) -> None:
        self._total = None

    def on_test_epoch_start(self) -> None:
        self._total = None

    def validation_step(self, batch: Batch, index: int) -> None:
        found = self.measures(batch)
        self._total = found if self._total is None else self._total + found

    def test_step(self, batch: Batch, index: int) -> None:
        self.validation_step(batch, index)

    def on_validation_epoch_end(self) -> None:
        self.scores, self.scored_at = self.scored(self._sum()), self.trainer.global_step
        self._log_best("val", self.scores)

    def on_test_epoch_end(self) -> None:
        self._log_best("test", self.scored(self._sum()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scores"], checkpoint["scored_at"] = self.scores, self.scored_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scores, self.scored_at = checkpoint["scores"], checkpoint["scored_at"]

    def _sum(self) -> Float64[Tensor, "..."]:
        """The measures of all processes."""
        assert self._total is not None
        gathered = self.all_gather(self._total)
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, *self._total.shape).sum(0)

    def _log_best(self, prefix: str, scores: dict[str, list[float]]) -> None:
        best = self.best
        self.log_dict({f"{prefix}_{name}": values[best] for name, values in scores.items()})
