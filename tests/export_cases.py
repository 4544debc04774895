"""What the tests of exports share: a tiny random network, a folder of images, and the hashes of a folder's files."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from repkit.backbones.unet import UNet
from repkit.extractors import DiffusionExtractor
from repkit.schedule import Schedule

TAPS = "mid,up.0@50"


def tiny_unet(*, classes: tuple[str, ...] = (), weights_seed: int = 0) -> UNet:
    """A random U-Net on 16 x 16 pixels."""
    torch.manual_seed(weights_seed)
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=len(classes) + 1 if classes else None,
    ).eval()
    return UNet(model, Schedule.from_betas("linear"), class_names=classes or None)


def tiny_extractor(taps: str = TAPS, **options) -> DiffusionExtractor:
    return DiffusionExtractor(tiny_unet(), taps, **options)


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_images(folder: Path, count: int) -> Path:
    """A folder of good images 000.png ..., each of its own content."""
    for index in range(count):
        write_image(folder / f"{index:03d}.png", index)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
