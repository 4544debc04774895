"""Every family as the contract sees it: tiny pipelines saved and loaded by their path, and networks of our own."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DDIMScheduler, DDPMPipeline, DiTPipeline

from repkit import zoo
from repkit.backbones.base import Backbone
from tests import tiny, tiny_adm, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3

PIPELINES: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: DDPMPipeline(tiny.unet_model(), DDIMScheduler()),
    "dit-vae": lambda: DiTPipeline(tiny.dit_model(), tiny.vae_model(), DDIMScheduler()),
    "sd": tiny_sd.sd_pipeline,
    "sd21": tiny_sd.sd21_pipeline,
    "sdxl": tiny_sd.sdxl_pipeline,
    "ssd": tiny_sd.ssd_pipeline,
    "pixart-alpha": tiny_pixart.alpha,
    "pixart-sigma": tiny_pixart.sigma,
    "sd3": tiny_sd3.pipeline,
    "sd35": lambda: tiny_sd3.pipeline(**tiny_sd3.MEDIUM),
    "flux": tiny_flux.flux_pipeline,
    "schnell": lambda: tiny_flux.flux_pipeline(guidance_embeds=False),
}
BUILT: dict[str, Callable[[], Backbone]] = {
    **tiny.OURS,
    "adm": tiny_adm.adm,
    "adm-classes": lambda: tiny_adm.adm("classes-new-order"),
}


def build(family: str) -> Backbone:
    """One of BUILT; or one of PIPELINES, saved to a folder and loaded from there as a real checkpoint is."""
    if family in BUILT:
        return BUILT[family]()
    with TemporaryDirectory() as folder:
        PIPELINES[family]().save_pretrained(folder)
        backbone = zoo.load(Path(folder))
        if backbone.prompts is not None:
            assert backbone.prompts.texts is not None
            backbone.prompts.texts.open()  # before the folder is gone
    return backbone
