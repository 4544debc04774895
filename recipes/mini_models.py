"""The two small models that ship with repkit: their networks, and the noise and prediction they are trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from jaxtyping import Float, Int64
from torch import Tensor, nn

from repkit.datasets.fashion_mnist import CLASSES
from repkit.schedule import Schedule


@dataclass(frozen=True)
class MiniModel:
    """A class-conditional pixel model; the label after the last class is the null class."""

    network: Any  # diffusers' class; their types do not say that it makes modules
    config: Mapping[str, Any]
    scheduler: Any  # diffusers' class
    scheduler_config: Mapping[str, Any]
    pipeline: str  # what diffusers calls the folder, in model_index.json
    component: str  # the network's folder in it

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_diffusers(self.scheduler(**self.scheduler_config))


MINI_MODELS = {
    "mini-unet": MiniModel(
        network=UNet2DModel,
        config={
            "sample_size": 32,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "num_class_embeds": len(CLASSES) + 1,
            "attention_head_dim": 32,
        },
        scheduler=DDPMScheduler,
        scheduler_config={
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
        },
        pipeline="DDPMPipeline",
        component="unet",
    ),
    "mini-dit": MiniModel(
        network=DiTTransformer2DModel,
        config={
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 8,
            "sample_size": 32,
            "patch_size": 4,
            "num_embeds_ada_norm": len(CLASSES),  # the network adds the null class itself
            "norm_num_groups": 1,
        },
        scheduler=FlowMatchEulerDiscreteScheduler,
        scheduler_config={"num_train_timesteps": 1000, "shift": 1.0},
        pipeline="DiTPipeline",
        component="transformer",
    ),
}


def mini_model(name: str) -> MiniModel:
    """The model of that name. Raises ValueError, listing what exists, for another."""
    if name not in MINI_MODELS:
        raise ValueError(f"no model {name!r} to pretrain; have {', '.join(MINI_MODELS)}")
    return MINI_MODELS[name]


def build_network(name: str, overrides: Mapping[str, Any] | None = None, *, seed: int = 0) -> nn.Module:
    """The network of `mini_model(name)`, its config changed by `overrides`, with random weights made from `seed`."""
    model = mini_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.network(**{**model.config, **(overrides or {})})
    if isinstance(network, DiTTransformer2DModel):
        _zero_adaln(network)
    return network


def predict(
    network: nn.Module, x_t: Float[Tensor, "b c h w"], t: Tensor, labels: Int64[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """What the network predicts at native times t [b], whole for discrete schedules."""
    t = t if t.dtype == torch.long else t.float()
    return network(x_t, t, class_labels=labels, return_dict=False)[0].float()


def _zero_adaln(network: Any) -> None:
    """adaLN-zero (Peebles & Xie 2023), which diffusers leaves out: each block begins as the identity."""
    for block in network.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(network.proj_out_2.weight)
    nn.init.zeros_(network.proj_out_2.bias)
