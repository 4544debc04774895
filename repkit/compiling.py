"""Compiling: the repeated blocks of a network as compiled code, in a stand-in that leaves the network as it was.

Blocks of one class whose weights have the same shapes run one compiled function, which takes the block as an argument:
what is compiled are the kinds of block, not the blocks. A block that a tap lies inside of is left to run as it is.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from repkit.capture import Point, copy_along, shallow_copy

Compiled = Mapping[str, Callable[..., Any]]  # path of a block -> what runs it, given the block
Backend = str | Callable[..., Any]  # as torch.compile takes it


def compile_blocks(model: nn.Module, points: Sequence[Point], *, backend: Backend = "inductor") -> Compiled:
    """What runs each repeated block of `model` but those that a point lies inside of; the first call compiles.

    Raises ValueError for a model whose blocks carry a forward of their own, as offloading leaves them.
    """
    functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
    compiled = {}
    for path in blocks(model):
        if any(_inside(point, path) for point in points):
            continue
        _check_plain(model, path)
        block = model.get_submodule(path)
        kind = (type(block), *((name, tuple(weight.shape)) for name, weight in block.named_parameters()))
        if kind not in functions:
            functions[kind] = _compile(kind, backend)
        compiled[path] = functions[kind]
    return compiled


def stand_in(model: nn.Module, compiled: Compiled) -> nn.Module:
    """A copy of `model`, down to its blocks, whose blocks run compiled; everything inside of them is shared."""
    copies = {"": shallow_copy(model)}
    for path, function in compiled.items():
        vars(copy_along(copies, path))["forward"] = partial(function, model.get_submodule(path))
    return copies[""]


def blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The paths of the repeated blocks: what lists of modules hold, inside of stages where these have lists again."""
    for name, child in module.named_children():
        if _is_list(child):
            for index, member in child.named_children():
                path = f"{prefix}{name}.{index}"
                yield from blocks(member, f"{path}.") if _is_stage(member) else [path]
        elif _is_stage(child):
            yield from blocks(child, f"{prefix}{name}.")


def _is_list(module: nn.Module) -> bool:
    """Whether it lists blocks, and not the layers of one, such as a projection and its dropout."""
    return isinstance(module, nn.ModuleList) and any(any(member.children()) for member in module.children())


def _is_stage(module: nn.Module) -> bool:
    return any(_is_list(child) for child in module.children())


def _inside(point: Point, path: str) -> bool:
    """Whether a point needs the block's own code: compiled code runs no hooks, and other modes than its own."""
    return point.path.startswith(f"{path}.") or (point.path == path and point.side not in ("output", "input"))


def _check_plain(model: nn.Module, path: str) -> None:
    names = path.split(".")
    for depth in range(len(names) + 1):
        if "forward" in vars(model.get_submodule(".".join(names[:depth]))):
            where = ".".join(names[:depth]) or type(model).__name__
            raise ValueError(f"{where} has a forward of its own (offloading?), which compile=True would pass by")


def _compile(kind: tuple[Any, ...], backend: Backend) -> Callable[..., Any]:
    forward = kind[0].forward

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    # Torch counts recompilations, and remembers which sizes vary, by code object and name: each kind has its own.
    name = f"{kind[0].__name__}_{hashlib.sha256(str(kind).encode()).hexdigest()[:12]}"
    run.__code__ = run.__code__.replace(co_name=name)
    return torch.compile(run, backend=backend)
