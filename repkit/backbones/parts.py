"""Parts: a pipeline taken apart, which is what every family is built from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repkit.backbones.latents import Latent
from repkit.backbones.prompts import TextEncoders
from repkit.schedule import Schedule


@dataclass(frozen=True)
class Parts:
    """A pipeline taken apart: its denoiser, its autoencoder, its text encoders, its schedule, what its index says.

    networks: by component name, `unet` or `transformer` and `vae`. extractor: what makes the latents, where no
    autoencoder does. texts is None for a pipeline without text encoders.
    """

    name: str
    networks: Mapping[str, Any]
    schedule: Schedule
    index: Mapping[str, Any] = field(default_factory=dict)
    latent: Latent = "mode"
    texts: TextEncoders | None = None
    extractor: Any = None

    @property
    def denoiser(self) -> Any:
        return self.networks["unet" if "unet" in self.networks else "transformer"]

    @property
    def vae(self) -> Any:
        return self.networks.get("vae")

    @property
    def class_names(self) -> list[str] | None:
        names = self.index.get("id2label")
        return None if names is None else [str(names[key]) for key in sorted(names, key=int)]
