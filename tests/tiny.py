"""Tiny random networks of every family: real diffusers classes, a few thousand weights, none of them zero."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from einops import rearrange
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.dit import DiT
from repkit.backbones.unet import UNet
from repkit.backbones.unet_points import unet_points
from repkit.capture import Point
from repkit.schedule import Schedule


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every parameter, since weights that start at zero would hide mistakes; frozen, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def unet_model(seed: int = 0, **options: Any) -> UNet2DModel:
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return randomise(UNet2DModel(**(config | options)), seed)


def dit_model(seed: int = 0, **options: Any) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,  # the second half is the learned variance
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 4,
    }
    return randomise(DiTTransformer2DModel(**(config | options)), seed)


def vae_model(seed: int = 1) -> AutoencoderKL:
    return randomise(
        AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=0.7,
            shift_factor=0.1,
            sample_size=8,
        ),
        seed,
    )


def linear(prediction: Any = "eps") -> Schedule:
    return Schedule.from_betas("linear", prediction)


NAMES = ["cat", "dog", "owl"]


def unet(**options: Any) -> UNet:
    return UNet(unet_model(**options), linear())


def grey_unet() -> UNet:
    """Class-conditional with a null class, one channel, learned variance, v-prediction."""
    model = unet_model(in_channels=1, out_channels=2, num_class_embeds=4)
    return UNet(model, linear("v"), name="grey", class_names=NAMES)


def skip_unet() -> UNet:
    """The blocks of NCSN++, whose image pyramid runs beside the network."""
    types = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    }
    return unet(block_out_channels=(32, 32), norm_num_groups=8, **types)


def resnet_unet() -> UNet:
    """The blocks of ADM, which change size by whole residual blocks; no attention in the middle."""
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        add_attention=False,
        block_out_channels=(8, 16),
    )


def edm_unet() -> UNet:
    return UNet(unet_model(), Schedule.edm())


def dit() -> DiT:
    return DiT(dit_model(), linear(), vae_model(), class_names=NAMES)


def pixel_dit() -> DiT:
    return DiT(dit_model(in_channels=3, out_channels=3, sample_size=8), linear())


class Told(Backbone):
    """A network told a text: what families yet to come will be, as little as it takes to run them."""

    def __init__(self, model: Any, schedule: Schedule, multiple: int, widths: Mapping[str, tuple[int, ...]]) -> None:
        self.name, self.model, self.schedule = type(model).__name__, model, schedule
        self.size, self.multiple, self.widths = 64, multiple, widths

    def encode(self, images: Tensor) -> Tensor:
        grey = nn.functional.avg_pool2d(images, 8).mean(1, keepdim=True)
        return grey * torch.linspace(-1, 1, self.channels)[:, None, None]

    @property
    def channels(self) -> int:
        return self.model.config.in_channels

    def condition(self, cond: Cond, batch: int) -> Condition:
        each = list(cond) if isinstance(cond, Sequence) and not isinstance(cond, str) else [cond] * batch
        seeds = [torch.Generator().manual_seed(len(str(one))) for one in each]
        return Condition(
            {name: torch.stack([torch.randn(w, generator=s) for s in seeds]) for name, w in self.widths.items()}
        )

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, timestep=t, return_dict=False, **condition.tensors)[0]


class TextUNet(Told):
    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = dict(condition.tensors)
        added = {name: told.pop(name) for name in ("text_embeds", "time_ids") if name in told}
        return model(x_t, t, added_cond_kwargs=added or None, return_dict=False, **told)[0]

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return unet_points(self.model)


class Joint(Told):
    """SD3: blocks return (text, image)."""

    @cached_property
    def points(self) -> Mapping[str, Point]:
        paths = [f"transformer_blocks.{index}" for index in range(len(self.model.transformer_blocks))]
        inner = {f"block.{index}.in.adaln": Point(f"{path}.norm1") for index, path in enumerate(paths)}
        return inner | {f"block.{index}": Point(path) for index, path in enumerate(paths)}

    def fold(self, point: Point, raw: Any, x_t: Tensor) -> Tensor:
        whole_block = isinstance(raw, tuple) and point.path.count(".") == 1
        return super().fold(point, raw[1] if whole_block else raw, x_t)


class Flux(Joint):
    """Latents packed 2x2 into tokens, and blocks that run text and image as one sequence."""

    @property
    def channels(self) -> int:
        return self.model.config.in_channels // 4

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        h, w = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        packed = rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros(h * w), rows.flatten(), columns.flatten()], 1)
        told = {**condition.tensors, "img_ids": ids, "txt_ids": torch.zeros(self.widths["encoder_hidden_states"][0], 3)}
        out = super().predict(model, packed, t / 1000, Condition(told))
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)

    @cached_property
    def points(self) -> Mapping[str, Point]:
        both = {"block": self.model.transformer_blocks, "single": self.model.single_transformer_blocks}
        lists = {"block": "transformer_blocks", "single": "single_transformer_blocks"}
        return {f"{name}.{i}": Point(f"{lists[name]}.{i}") for name, blocks in both.items() for i in range(len(blocks))}


def sd() -> Told:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    schedule = Schedule.from_betas("scaled_linear", "v")
    return TextUNet(randomise(model), schedule, 8, {"encoder_hidden_states": (7, 12)})


def sdxl() -> Told:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        use_linear_projection=True,
    )
    widths = {"encoder_hidden_states": (7, 12), "text_embeds": (10,), "time_ids": (6,)}
    return TextUNet(randomise(model), linear(), 8, widths)


def sd3() -> Told:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
    )
    widths = {"encoder_hidden_states": (5, 12), "pooled_projections": (10,)}
    return Joint(randomise(model), Schedule.flow(3.0), 16, widths)


def flux() -> Told:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    widths = {"encoder_hidden_states": (6, 12), "pooled_projections": (10,), "guidance": ()}
    return Flux(randomise(model), Schedule.flow(), 16, widths)


OURS = {
    "unet": unet,
    "grey": grey_unet,
    "skip": skip_unet,
    "resnet": resnet_unet,
    "edm": edm_unet,
    "dit": dit,
    "pixel-dit": pixel_dit,
}
TOLD = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def images(count: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """Random 8-bit images as float tensors in [0, 1]."""
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255
