"""Checkpoints of heads: one file, replaced whole, from which a run goes on as if it had not been stopped."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from repkit.recipes.curves import Curves


class LastCheckpoint(Checkpoint):
    """Keeps out/last.ckpt: at every `every`-th step, after validations, and at the end.

    `curves`, what was logged, travel in the checkpoint, so a resume neither loses nor repeats a point. Lightning calls
    this after all other callbacks, so their states are those of the same moment.
    """

    def __init__(self, out: Path, every: int) -> None:
        self.path, self.every = out / "last.ckpt", every
        self.curves: Curves = {}
        self.ended = False

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(trainer, "train_")
        # A validation that follows belongs to the step; after a resume it would not be made up for.
        if step % self.every == 0 and step % int(trainer.val_check_batch or 1):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._note(trainer, "val_")
            self.ended = trainer.should_stop
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"ended": self.ended, "curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ended, self.curves = state_dict["ended"], state_dict["curves"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop = self.ended  # by early stopping, before this run began

    def _note(self, trainer: Trainer, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                self.curves.setdefault(name, []).append((trainer.global_step, float(value)))

    def _save(self, trainer: Trainer) -> None:
        new = self.path.with_suffix(".ckpt.tmp")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            os.replace(new, self.path)
