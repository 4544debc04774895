"""Train the bundled models, mini-unet and mini-dit, on Fashion-MNIST; a killed run continues as if it had not been.

Weights are the same bits in every run on one machine's CPU at one number of threads.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from repkit.datasets.fashion_mnist import DEBIAN
from repkit.recipes.class_noise import ClassNoise
from repkit.recipes.mini_models import build_network, mini_model, predict
from repkit.recipes.model_folder import export_model, read_weights, write_losses
from repkit.recipes.reading import with_config
from repkit.recipes.telling import Bars, quiet
from repkit.recipes.training_images import Batch, TrainingImages, step_generator
from repkit.schedule import Schedule

_FIXED = ("model", "network", "batch", "seed")  # what a resume may not change: a step would mean something else


@dataclass(frozen=True)
class Options:
    """Everything that decides a pretraining.

    Args:
        model: mini-unet (v-prediction, cosine schedule) or mini-dit (flow matching)
        out: folder for last.ckpt, loss.csv and model/, the exported model; a run found there is resumed
        data: folder with the original files of Fashion-MNIST, or "bundled" for the 4,000 images of a smoke run
        steps: training steps in all, those before a resume included
        batch: images a step
        lr: the highest learning rate
        warmup: steps in which the learning rate rises to it
        decay: last share of the steps, in which it falls linearly, to 2 % at least
        ema_decay: decay of the averaged weights, which are what is exported; lower in the first steps
        label_dropout: share of the labels that are replaced by the null class
        cond_noise: gamma of the Gaussian noise on the embedding of the class, whose deviation is gamma / sqrt(its
            length); 0 for none ("Slight corruption in pre-training data makes better diffusion models", Chen et al.
            2024, eq. 8, with gamma = 1)
        seed: decides initial weights, order of the images, noise, times and dropped labels
        precision: Lightning's name, such as bf16-mixed or 32-true
        accelerator: Lightning's name, such as cpu, gpu or auto; always one device
        threads: threads of the CPU; the weights' last bits depend on it
        compile: compile the network first
        checkpoint_every: steps between checkpoints
        init: model folder or checkpoint whose (averaged) weights to start from
        network: options of the diffusers network that replace the model's own
    """

    model: str = "mini-unet"
    out: str = "pretrained"
    data: str = DEBIAN
    steps: int = 30_000
    batch: int = 64
    lr: float = 8e-4
    warmup: int = 500
    decay: float = 0.25
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    cond_noise: float = 0.0
    seed: int = 0
    precision: str = "bf16-mixed"
    accelerator: str = "cpu"
    threads: int = 1
    compile: bool = False
    checkpoint_every: int = 1000
    init: str | None = None
    network: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mini_model(self.model)
        for name in ("steps", "batch", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        for name in ("decay", "ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share; give 0 to 1")
        if not self.cond_noise >= 0:
            raise ValueError(f"cond_noise={self.cond_noise}; give 0 or more")


class Denoiser(LightningModule):
    """A mini model in training: `network` and `ema`, its running mean over the steps."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.save_hyperparameters(asdict(options))
        self.options, self.schedule = options, mini_model(options.model).schedule
        self.network, self.ema = (build_network(options.model, options.network, seed=options.seed) for _ in range(2))
        if options.init is not None:
            weights = read_weights(options.init, options.model)
            self.network.load_state_dict(weights)
            self.ema.load_state_dict(weights)
        self.ema.requires_grad_(False)
        self.class_noise = ClassNoise(self.network, options.cond_noise) if options.cond_noise else None

    def on_train_start(self) -> None:
        # In training mode diffusers' DiT would drop labels itself, in each block others; nothing else has a mode.
        self.eval()

    def training_step(self, batch: Batch, index: int) -> Float[Tensor, ""]:
        t = self.schedule.time_at(batch.u)
        assert isinstance(t, Tensor)
        x_t = self.schedule.add_noise(batch.x0, batch.eps, t)
        if self.class_noise is not None:
            generator = step_generator(self.options.seed, "class noise", self.global_step)
            self.class_noise.draw(len(batch.x0), generator, self.device)
        with _attention(self.device):
            prediction = predict(self.network, x_t, t, batch.labels)
        loss = F.mse_loss(prediction, target(self.schedule, batch.x0, batch.eps, t))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        # Lightning's own refuses a fused optimizer under mixed precision, though bf16 has no scale to undo.
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        done = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        decay = min(self.options.ema_decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.network.parameters()), done)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def target(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Float[Tensor, "b c h w"]:
    """What the network should have predicted: v = alpha*eps - sigma*x0, or for a flow eps - x0."""
    if schedule.prediction == "flow":
        return eps - x0
    # v is x_t with the coefficients turned by a quarter: (alpha, sigma) -> (-sigma, alpha)
    alpha, sigma = (c.float()[:, None, None, None] for c in schedule.coefficients(t))
    return alpha * eps - sigma * x0


def lr_factor(step: int, options: Options) -> float:
    """Learning rate of `step` as a share of the highest."""
    rising = (step + 1) / max(options.warmup, 1)
    falling = (options.steps - step) / max(options.decay * options.steps, 1)
    return min(1.0, rising) * min(1.0, max(0.02, falling))


def _attention(device: torch.device) -> AbstractContextManager:
    # For this few tokens plain products are faster on a CPU than its fused kernel.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class Checkpoints(Callback):
    """Keeps out/last.ckpt and out/loss.csv; the losses travel in the checkpoint, so a resume repeats no row."""

    def __init__(self, options: Options) -> None:
        self.out, self.every = Path(options.out), options.checkpoint_every
        self.losses, self._recent = torch.zeros(0), list[Tensor]()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *args: Any) -> None:
        self._recent.append(outputs["loss"].detach())
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            # Lightning's own writer moves a file from the folder for temporary ones: across file systems a copy,
            # which a kill can cut short.
            trainer.save_checkpoint(self.out / "last.ckpt.tmp")
            os.replace(self.out / "last.ckpt.tmp", self.out / "last.ckpt")
            write_losses(self.losses, self.out / "loss.csv")

    def state_dict(self) -> dict[str, Tensor]:
        recent, self._recent = self._recent, []
        self.losses = torch.cat([self.losses, *(loss.float().cpu()[None] for loss in recent)])
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.losses = state_dict["losses"]


def pretrain(options: Options) -> Path:
    """Train, or go on from out/last.ckpt, then export the averaged weights; returns the folder out/model.

    Raises ValueError if out holds a run of another model, network, batch or seed, and FileNotFoundError without data.
    """
    torch.set_num_threads(options.threads)
    last = Path(options.out) / "last.ckpt"
    last.parent.mkdir(parents=True, exist_ok=True)
    if last.exists():
        _check_same_run(last, options)
    denoiser = Denoiser(options)
    if options.compile:
        # What was compiled for another network of the class would serve for this one, and without its hooks.
        torch.compiler.reset()
        denoiser.network.compile()
    data = TrainingImages(
        options.data,
        denoiser.network.config.sample_size,
        batch=options.batch,
        label_dropout=options.label_dropout,
        seed=options.seed,
    )
    trainer = _trainer(options)
    try:
        trainer.fit(denoiser, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None
    return export_model(last, last.parent / "model")


def _trainer(options: Options) -> Trainer:
    return Trainer(
        max_steps=options.steps,
        max_epochs=-1,  # the one epoch never ends
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,  # type: ignore[arg-type]
        callbacks=[Checkpoints(options), Bars()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )


def _check_same_run(checkpoint: Path, options: Options) -> None:
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["hyper_parameters"]
    changed = [name for name in _FIXED if saved[name] != getattr(options, name)]
    if changed:
        was = ", ".join(f"{name}={saved[name]!r} (now {getattr(options, name)!r})" for name in changed)
        raise ValueError(f"{checkpoint} is of a run with {was}; give the same, or another out")


def parse_options(args: Sequence[str] | None = None) -> Options:
    """Options from `[FILE] [--option value ...]`, the later ones winning; without `args`, of this process.

    Raises SystemExit, after a usage message, for an option or a type that does not fit.
    """
    return auto_cli(Options, args=None if args is None else with_config(args), prog="repkit pretrain")


def main(args: Sequence[str] | None = None) -> None:
    """`repkit pretrain`: parse, train or go on, export; prints the model folder."""
    quiet()
    print(pretrain(parse_options(args)))


if __name__ == "__main__":
    main()
