"""SiT, REPA and SVG checkpoints, and the first DiT's: transformers on latents, most of them on a linear path."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.labels import class_labels
from repkit.backbones.latents import Latent, decode_pixels, decode_vae, encode_pixels, encode_vae, vae_stride
from repkit.backbones.options import COUNT, NUMBERS, TEXT, TEXTS, Kind, check_options, one_of
from repkit.backbones.parts import Parts
from repkit.backbones.sit_weights import NetworkTime, network_time, read_network
from repkit.backbones.svg import FeatureLatents
from repkit.capture import Point
from repkit.schedule import Schedule

_OPTIONS: Mapping[str, Kind] = {
    "time": one_of(*get_args(NetworkTime)),
    "heads": COUNT,
    "classes": COUNT,
    "class_names": TEXTS,
    "key": TEXT,
    "mean": NUMBERS,
    "std": NUMBERS,
}


class SiT(Backbone):
    """A class-conditional transformer on the latents of an autoencoder or an extractor, or on pixels.

    time: what the network was told in training. "sit": 0 for noise to 1 for data, and it returns data - noise; "repa":
    0 for data to 1 for noise, and it returns noise - data; "dit": steps 0 ... 999 of the linear schedule, and it
    returns the noise. Native time and prediction are the schedule's for all three. The labels past `classes` hold the
    null class.
    """

    square = True  # the positions are of one grid

    def __init__(
        self,
        model: Any,
        time: NetworkTime,
        vae: Any = None,
        features: FeatureLatents | None = None,
        *,
        name: str = "sit",
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        latent: Latent = "mode",
    ) -> None:
        config = model.config
        self.name, self.model, self.time, self.latent = name, model, time, latent
        self.schedule = Schedule.from_betas("linear") if time == "dit" else Schedule.flow()
        self.vae, self.features = vae, features
        stride = self._check_latents(config["in_channels"])
        self.size, self.multiple = config["sample_size"] * stride, config["patch_size"] * stride
        self.class_names = class_names
        self.classes = config["labels"] - 1 if classes is None else classes
        if not 0 < self.classes <= config["labels"]:
            raise ValueError(
                f"{classes} classes in {name}, which has {config['labels']} labels, the null class included"
            )
        own = {} if self.classes == config["labels"] - 1 else {"classes": self.classes}  # which label is the null class
        self.options: Mapping[str, Any] = {"time": time, **own, **_latents_identity(vae, features, latent)}

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        if self.features is not None:
            return self.features.encode(images)
        if self.vae is not None:
            return encode_vae(self.vae, images, self.latent)
        return encode_pixels(images, self.model.config["in_channels"])

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        if self.features is not None:
            return super().decode(x0)
        return decode_pixels(x0) if self.vae is None else decode_vae(self.vae, x0)

    def condition(self, cond: Cond, batch: int) -> Condition:
        count = self.classes
        null = count if count < self.model.config["labels"] else None
        labels = class_labels(cond, batch, names=self.class_names, count=count, null=null, model=self.name)
        return Condition({"labels": labels.to(self.device)})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = {"sit": 1 - t / 1000, "repa": t / 1000, "dit": t.float()}[self.time]
        prediction = model(x_t, told, **condition.tensors)[:, : x_t.shape[1]]
        return -prediction if self.time == "sit" else prediction

    @cached_property
    def points(self) -> Mapping[str, Point]:
        points: dict[str, Point] = {}
        for index, _ in enumerate(self.model.blocks):
            name, path = f"block.{index}", f"blocks.{index}"
            points[f"{name}.in"] = Point(path, "input")
            points[f"{name}.in.adaln"] = Point(f"{path}.norm1")
            points |= {f"{name}.attn.{part}": Point(f"{path}.attn.{part}") for part in "qkv"}
            points[f"{name}.attn.map"] = Point(f"{path}.attn", "attention")
            points[f"{name}.attn.out"] = Point(f"{path}.attn")
            points[f"{name}.mlp"] = Point(f"{path}.mlp")
            points[name] = Point(path)
        return points

    def _check_latents(self, channels: int) -> int:
        """The image pixels a latent pixel; ValueError unless what makes the latents makes as many channels."""
        if self.vae is not None and self.features is not None:
            raise ValueError(f"{self.name} works on one kind of latents; give vae= or extractor=, not both")
        made, stride = channels, 1
        if self.vae is not None:
            made, stride = self.vae.config.latent_channels, vae_stride(self.vae)
        elif self.features is not None:
            made, stride = self.features.channels, self.features.stride
        elif channels not in (1, 3):
            raise ValueError(
                f"{self.name} works on latents of {channels} channels; give vae=, the folder or hub id of their "
                "autoencoder (stabilityai/sd-vae-ft-mse for SiT, REPA and DiT), or extractor= where they are features"
            )
        if made != channels:
            raise ValueError(
                f"{self.name} takes latents of {channels} channels, not {made}; give another vae= or extractor="
            )
        return stride

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        vae = {} if self.vae is None else {"vae": self.vae}
        return {"denoiser": self.model, **vae, **({} if self.features is None else self.features.networks)}


def _latents_identity(vae: Any, features: FeatureLatents | None, latent: Latent) -> dict[str, Any]:
    if features is not None:
        return {"latent": "features", "features": features.identity}
    return {} if vae is None else {"latent": latent}


def from_weights(
    weights: Mapping[str, Tensor],
    *,
    name: str,
    config: Mapping[str, Any] | None = None,
    vae: Any = None,
    extractor: Any = None,
    latent: Latent = "mode",
) -> SiT:
    """A frozen SiT from a checkpoint's weights, whose shapes say all but the heads, the null class and the time.

    config: what they do not say, where it is not that of a published model: `time` ("sit", "repa" or "dit"), `heads`,
    `classes` (without the null class, by default the last label), `class_names`; and for an extractor's latents `key`,
    `mean` and `std`. The network shares its tensors with `weights`.
    Raises OSError for weights that are missing, ValueError for what does not fit a SiT.
    """
    options = check_options(config, _OPTIONS, name)
    time = options.get("time") or network_time(weights, name)
    statistics = {key: options[key] for key in ("key", "mean", "std") if key in options}
    if statistics and extractor is None:
        raise ValueError(f"config {', '.join(statistics)} is about an extractor's features; give extractor= as well")
    return SiT(
        read_network(weights, name, options.get("heads")),
        time,
        vae,
        None if extractor is None else FeatureLatents(extractor, **statistics),
        name=name,
        classes=options.get("classes"),
        class_names=options.get("class_names"),
        latent=latent,
    )


def from_parts(parts: Parts) -> SiT:
    """A SiT of a SiTTransformer in memory, whose index says how the network's time runs."""
    return SiT(parts.denoiser, parts.index["time"], parts.vae, name=parts.name, latent=parts.latent)
