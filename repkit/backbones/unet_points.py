"""The names of a diffusers U-Net's activations, read off its structure: the same for every model of the family."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from repkit.capture import Point


def unet_points(model: Any) -> dict[str, Point]:
    """`down.i`, `mid`, `up.i` (a stage's output, after its sampler), what lies inside them, and the `skip.n` tensors.

    Inside a stage: `resnet.j` and its `conv2` (before the shortcut is added), `attn.j`, and of each attention its
    projections `q`, `k`, `v`, its `map` and its `out`. The keys and values of cross-attention are tokens of the text
    and lie on no grid, so they have no names. `skip.0` is the first convolution's output, then one for each down layer
    and downsampler in turn.
    """
    points: dict[str, Point] = {}
    skips = ["conv_in"]
    for index, stage in enumerate(model.down_blocks):
        path = f"down_blocks.{index}"
        points |= _stage_points(f"down.{index}", path, stage)
        skips += _skip_paths(path, stage)
    if model.mid_block is not None:
        points |= _stage_points("mid", "mid_block", model.mid_block)
    for index, stage in enumerate(model.up_blocks):
        points |= _stage_points(f"up.{index}", f"up_blocks.{index}", stage)
    return points | {f"skip.{index}": Point(path) for index, path in enumerate(skips)}


def _stage_points(name: str, path: str, stage: nn.Module) -> dict[str, Point]:
    points: dict[str, Point] = {}
    for index, _ in enumerate(_listed(stage, "resnets")):
        points[f"{name}.resnet.{index}.conv2"] = Point(f"{path}.resnets.{index}.conv2")
        points[f"{name}.resnet.{index}"] = Point(f"{path}.resnets.{index}")
    for index, attention in enumerate(_listed(stage, "attentions")):
        if attention is not None:  # a middle stage built without attention keeps empty places
            points |= dict(_attention_points(f"{name}.attn.{index}", f"{path}.attentions.{index}", attention))
            points[f"{name}.attn.{index}"] = Point(f"{path}.attentions.{index}")
    return points | {name: Point(path)}


def _attention_points(name: str, path: str, attention: nn.Module) -> Iterator[tuple[str, Point]]:
    if hasattr(attention, "to_q"):  # plain self-attention, as in UNet2DModel
        yield from _projections(f"{name}.self", path)
        return
    for index, block in enumerate(_listed(attention, "transformer_blocks")):
        inner, inside = f"{name}.block.{index}", f"{path}.transformer_blocks.{index}"
        yield from _projections(f"{inner}.self", f"{inside}.attn1")
        if getattr(block, "attn2", None) is not None:
            yield from _projections(f"{inner}.cross", f"{inside}.attn2", "q")
        yield f"{inner}.ff", Point(f"{inside}.ff")


def _projections(name: str, path: str, projected: str = "qkv") -> Iterator[tuple[str, Point]]:
    for part in projected:
        yield f"{name}.{part}", Point(f"{path}.to_{part}")
    yield f"{name}.map", Point(path, "attention")
    yield f"{name}.out", Point(path)


def _skip_paths(path: str, stage: nn.Module) -> list[str]:
    attentions = _listed(stage, "attentions")
    last = "attentions" if attentions else "resnets"
    paths = [f"{path}.{last}.{index}" for index, _ in enumerate(_listed(stage, "resnets"))]
    return paths + [path] * bool(_listed(stage, "downsamplers"))  # the stage's own output, down and all


def _listed(module: nn.Module, name: str) -> list[nn.Module | None]:
    return list(getattr(module, name, None) or [])
