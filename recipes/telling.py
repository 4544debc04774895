"""Bars: what a run has done, on stderr; Lightning's own bars write to stdout, where results are."""

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from repkit.progress import Progress


def quiet() -> None:
    """Keep from users what Lightning says of devices that nobody asked for, and of newer torches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*_pytree")


class Bars(Callback):
    """A bar for the steps of training and one for each evaluation, on the first process alone."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        words = ", ".join(f"{name} {value:.3g}" for name, value in trainer.progress_bar_metrics.items())
        self._tell(trainer, "train", trainer.global_step, trainer.max_steps, words)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self._tell(trainer, "validate", args[2] + 1, int(sum(trainer.num_val_batches)))

    def on_test_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self._tell(trainer, "test", args[2] + 1, int(sum(trainer.num_test_batches)))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _tell(self, trainer: Trainer, what: str, done: int, total: int, words: str = "") -> None:
        if not trainer.is_global_zero:
            return
        if self.bar is None or self.bar.what != what:
            self._close()
            self.bar = Progress(what, unit="steps" if what == "train" else "batches")
        self.bar(done, total, words=words)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__()
            self.bar = None
