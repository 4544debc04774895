"""Capture: take activations inside a network without computing what comes after, and without touching the network.

The forward runs on a shallow copy in which only the tapped modules and their ancestors are new objects, all sharing
the caller's parameters. Hooks sit on the copies, and the last one ends the forward by an exception; so the caller's
model never carries a hook, another thread may use it meanwhile, and every value is the full run's own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Point:
    """Where a value is taken: a module's output, or its first positional input, by the module's dotted path."""

    path: str
    side: Literal["output", "input"] = "output"


class _Stop(Exception):
    """Ends a forward once every point has been taken."""


def capture(
    model: nn.Module,
    points: Sequence[Point],
    run: Callable[[nn.Module], Any],
    *,
    stop: bool = True,
    taken_at: Callable[[Point], Any] | None = None,
) -> dict[Point, Any]:
    """Call `run` with a stand-in for `model` and return each point's raw value, stopping at the last one.

    A module that runs several times counts with its first call. With `stop=False` the whole forward is computed.
    `taken_at` is called with each point at the moment it is reached.
    Raises ValueError for a path that is not in the model and for a module that the forward never calls.
    """
    wanted = list(dict.fromkeys(points))
    taken: dict[Point, Any] = {}
    over = False

    def take(point: Point, value: Any) -> None:
        if over:  # gradient checkpointing runs modules again in the backward pass
            return
        taken.setdefault(point, value)
        if taken_at:
            taken_at(point)
        if stop and len(taken) == len(wanted):
            raise _Stop

    with _tapped(model, wanted, take) as stand_in:
        try:
            run(stand_in)
        except _Stop:
            pass
    over = True
    if missed := [point.path for point in wanted if point not in taken]:
        raise ValueError(
            f"{', '.join(missed)} did not run in this forward, so there is nothing to take there; "
            "name a module that is called (a list of modules is not)"
        )
    return taken


@contextmanager
def _tapped(model: nn.Module, points: Sequence[Point], take: Callable[[Point, Any], None]) -> Iterator[nn.Module]:
    """A model to run in place of `model` that reports each point to `take`."""
    above = [module for point in points for module in _ancestors(model, point.path)]
    if not any(_runs_elsewhere(module) for module in above):
        copies = {"": _shallow_copy(model)}
        for point in points:
            _hook(_copy_along(copies, point.path), point, take)
        yield copies[""]
        return
    # An ancestor's forward is bound to the original (offloading wrappers do that), so the hooks have to sit there too.
    here = threading.get_ident()

    def take_here(point: Point, value: Any) -> None:
        if threading.get_ident() == here:
            take(point, value)

    handles = [_hook(_module(model, point.path), point, take_here) for point in points]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, point: Point, take: Callable[[Point, Any], None]) -> Any:
    if point.side == "output":
        return module.register_forward_hook(lambda module, args, output: take(point, output))
    return module.register_forward_pre_hook(
        lambda module, args, kwargs: take(point, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )


_DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A new module object with the same children and parameters, and dicts of its own to hang hooks and copies in."""
    new = module.__class__.__new__(module.__class__)
    vars(new).update(vars(module))
    vars(new).update({name: vars(module)[name].copy() for name in _DICTS})
    vars(new)["_compiled_call_impl"] = None  # compiled calls are bound to the original and would pass by the copy
    return new


def _copy_along(copies: dict[str, nn.Module], path: str) -> nn.Module:
    """Copy each module from the root to `path` that is not yet in `copies`; returns the copy at `path`."""
    if path not in copies:
        above, _, name = path.rpartition(".")
        parent = _copy_along(copies, above)
        parent._modules[name] = copies[path] = _shallow_copy(parent._modules[name])  # type: ignore[arg-type]
    return copies[path]


def _runs_elsewhere(module: nn.Module) -> bool:
    return "forward" in vars(module)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return _no_module(model, path)


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules above `path`, root first; ValueError where the path leaves the model."""
    _module(model, path)
    names = path.split(".")
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) if path else 0)]


def _no_module(model: nn.Module, path: str) -> nn.Module:
    known, names = model, path.split(".")
    for depth, name in enumerate(names):
        if name not in known._modules:
            where = ".".join(names[:depth]) or type(model).__name__
            raise ValueError(f"no module {path!r}: {where} has {', '.join(known._modules) or 'no modules'}")
        known = known._modules[name]  # type: ignore[assignment]
    return known
