"""What taps, times, draws and noise cost: `python benchmarks/forward.py` measures it and writes docs/BENCHMARKS.md.

On a batch of Fashion-MNIST and a bundled model, as ratios within one run: the truncated forward over the full one, many
taps, times and draws over the deepest tap alone, and making the noise over the forward.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from measuring import PAGE, machine, ratio, table, take_turns, write_section
from PIL import Image
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor
from repkit.images import Resize, digest, to_tensor, to_uint8
from repkit.noise import batch_noise
from repkit.zoo import load

TIME = 100
NOISED = ("down.0", "mid", "up.0")  # forwards that the noise is compared with

Images = Float[Tensor, "b 3 H W"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-unet", help="a bundled U-Net")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    backbone = load(options.model)
    images = decoded(options.batch, Resize(backbone.size))
    with torch.no_grad():
        parts = [part(backbone, images, options.rounds) for part in (truncation, many_taps, noise)]
    about = f"`python benchmarks/forward.py`: {options.model}, a batch of {options.batch}, {options.rounds} rounds."
    body = "\n\n".join([about, machine(), *parts])
    print(body)
    write_section(options.page, "Forward", body)


def decoded(count: int, resize: Resize) -> Images:
    """The first test images, as an extractor takes them."""
    images, _ = fashion_mnist.load("test")
    pictures = [Image.fromarray(image).convert("RGB") for image in images[:count]]
    return to_tensor(np.stack([resize(picture)[0] for picture in pictures]))


def truncation(backbone: Backbone, images: Images, rounds: int) -> str:
    """The forward that ends at each stage block over the full one, beside its share of the FLOPs."""
    x_t, condition = ready(backbone, images)
    seconds = take_turns(forwards(backbone, x_t, condition, stages(backbone)), rounds)
    rows = [
        (f"`{block}`", f"{ratio(seconds[block], seconds['full']):.3f}", f"{backbone.flops[block]:.3f}")
        for block in stages(backbone)
    ]
    return f"""### Truncated forward

The forward that ends at a block over the full one, and the share of the FLOPs that `repkit blocks` names.

{table(("ends at", "time", "FLOPs"), rows)}"""


def many_taps(backbone: Backbone, images: Images, rounds: int) -> str:
    """All stage blocks over the deepest alone, and what more times and draws cost."""
    blocks = stages(backbone)
    deepest = blocks[-1]
    extractors = {
        "deepest": DiffusionExtractor(backbone, [f"{deepest}@{TIME}"]),
        "all": DiffusionExtractor(backbone, [f"{','.join(blocks)}@{TIME}"]),
        "times": DiffusionExtractor(backbone, [f"{deepest}@50,{TIME},150,200"]),
        "draws": DiffusionExtractor(backbone, [f"{deepest}@{TIME}"], draws=4),
    }
    seconds = take_turns({name: partial(extract, images) for name, extract in extractors.items()}, rounds)
    cost = {name: ratio(taken, seconds["deepest"]) for name, taken in seconds.items()}
    rows = [
        (f"all {len(blocks)} stage blocks", f"{cost['all']:.3f}", "<= 1.05"),
        ("4 times", f"{cost['times']:.3f}", "<= 4"),
        ("4 draws", f"{cost['draws']:.3f}", "<= 4"),
    ]
    head = ("", f"over `{deepest}` at one time", "aim")
    return f"""### Several taps, times and draws

One call of the extractor on decoded images.

{table(head, rows)}"""


def noise(backbone: Backbone, images: Images, rounds: int) -> str:
    """The digests and the counter-based noise of a batch over its forward."""
    x_t, condition = ready(backbone, images)
    making: dict[str, Callable[[], object]] = {"noise": partial(noised, backbone, images)}
    actions = {**making, **forwards(backbone, x_t, condition, NOISED)}
    seconds = take_turns(actions, rounds)
    shares = {name: ratio(seconds["noise"], seconds[name]) for name in actions}
    rows = [(f"the forward to `{block}`", f"{shares[block]:.2%}") for block in NOISED]
    rows.append(("the full forward", f"{shares['full']:.2%}"))
    return f"""### Noise

The noise that depends on the image alone (digest, generator, x_t), over the forward of the same batch.

{table(("over", "time"), rows)}"""


def forwards(
    backbone: Backbone, x_t: Tensor, condition: Condition, blocks: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """The full forward, and the one that ends at each block."""
    ends = {block: partial(backbone.activations, x_t, TIME, condition, [block]) for block in blocks}
    return {"full": partial(backbone.denoise, x_t, TIME, condition), **ends}


def noised(backbone: Backbone, images: Images) -> Float[Tensor, "b c h w"]:
    """x_t of a batch, with the noise that an extractor gives it."""
    x0 = backbone.encode(images)
    digests = [digest(image) for image in to_uint8(images)]
    eps = batch_noise(x0.shape[1:], seed=0, digests=digests, t=float(TIME), draw=0)
    return backbone.schedule.add_noise(x0, eps, TIME)


def ready(backbone: Backbone, images: Images) -> tuple[Tensor, Condition]:
    """x_t of a batch, and the null condition: what the network takes."""
    return noised(backbone, images), backbone.condition(None, len(images))


def stages(backbone: Backbone) -> list[str]:
    """The stage blocks, in the order of the forward."""
    return [name for name in backbone.points if name == "mid" or name.count(".") == 1 and "skip" not in name]


if __name__ == "__main__":
    main()
