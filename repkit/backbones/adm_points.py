"""The names of an ADM's activations: those of every U-Net, and the numbers that papers give its blocks."""

from collections.abc import Iterator

from repkit.backbones.adm_unet import ADMUNet, Attention, Stage
from repkit.capture import Point


def adm_points(model: ADMUNet) -> dict[str, Point]:
    """`down.i`, `mid`, `up.i` (a level's output, after its sampler), what lies inside them, the `skip.n`; and papers'.

    Those of papers are names of their own for the same values: `input_blocks.k`, `middle_block`, `output_blocks.k` as
    the modules are called (label-efficient segmentation, DIFT), and `b1` to `b37` for all of them in a row (diffssl's
    numbers; fewer or more in other sizes). `skip.k` is `input_blocks.k`.
    """
    each, levels = model.config["num_res_blocks"] + 1, len(model.config["channel_mult"])
    inputs, outputs = len(model.input_blocks), len(model.output_blocks)
    points: dict[str, Point] = {}
    for level in range(levels):
        paths = [f"input_blocks.{index}" for index in range(1 + level * each, min(1 + (level + 1) * each, inputs))]
        points |= _level(f"down.{level}", model, paths, each - 1)
    points |= dict(_layer("mid", 0, "middle_block", model.middle_block))
    points |= dict(_resnet("mid.resnet.1", "middle_block.2")) | {"mid": Point("middle_block")}
    for level in range(levels):
        paths = [f"output_blocks.{index}" for index in range(level * each, (level + 1) * each)]
        points |= _level(f"up.{level}", model, paths, each)
    points |= {f"skip.{index}": Point(f"input_blocks.{index}") for index in range(inputs)}
    paths = [f"input_blocks.{index}" for index in range(inputs)]
    paths += ["middle_block", *(f"output_blocks.{index}" for index in range(outputs))]
    return points | {path: Point(path) for path in paths} | {f"b{n}": Point(p) for n, p in enumerate(paths, 1)}


def _level(name: str, model: ADMUNet, paths: list[str], resnets: int) -> dict[str, Point]:
    points: dict[str, Point] = {}
    for index, path in enumerate(paths[:resnets]):
        stage = model.get_submodule(path)
        assert isinstance(stage, Stage)
        points |= dict(_layer(name, index, path, stage))
    return points | {name: Point(paths[-1])}


def _layer(name: str, index: int, path: str, stage: Stage) -> Iterator[tuple[str, Point]]:
    """A residual block and the attention after it, if any."""
    yield from _resnet(f"{name}.resnet.{index}", f"{path}.0")
    if len(stage) > 1 and isinstance(stage[1], Attention):
        inner = f"{name}.attn.{index}"
        for part in "qkv":
            yield f"{inner}.self.{part}", Point(f"{path}.1.{part}")
        yield f"{inner}.self.map", Point(f"{path}.1", "attention")
        yield f"{inner}.self.out", Point(f"{path}.1.proj_out")
        yield inner, Point(f"{path}.1")


def _resnet(name: str, path: str) -> Iterator[tuple[str, Point]]:
    yield f"{name}.conv2", Point(f"{path}.out_layers.3")
    yield name, Point(path)
