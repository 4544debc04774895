"""Capture: take activations inside a network without computing what comes after, and without touching the network.

The forward runs on a shallow copy in which only the tapped modules and their ancestors are new objects, all sharing
the caller's parameters. Hooks sit on the copies, and the last one ends the forward by an exception; so the caller's
model never carries a hook, another thread may use it meanwhile, and every value is the full run's own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from repkit.attention import Attended, Part, Watch

Side = Literal["output", "input", "call", "attention"]


@dataclass(frozen=True)
class Point:
    """Where a value is taken: a module by its dotted path, and which side of it.

    output: what it returns. input: its first positional argument. call: (module, args, kwargs) of its call, the module
    being the copy that runs, from which a part of it can be computed anew. attention: the `Attended` of the first
    `scaled_dot_product_attention` in it; part says which keys a joint map is for and does not change the value.
    """

    path: str
    side: Side = "output"
    part: Part = "image"


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
    _check_taken([point for point in wanted if point not in taken])
    return taken


def _check_taken(missed: Sequence[Point]) -> None:
    if paths := [point.path for point in missed if point.side != "attention"]:
        raise ValueError(
            f"{', '.join(paths)} did not run in this forward, so there is nothing to take there; "
            "name a module that is called (a list of modules is not)"
        )
    if missed:
        raise ValueError(
            f"no attention map of {', '.join(point.path for point in missed)}: unsupported, since no "
            "scaled_dot_product_attention is called there; take another tap, or give the module a processor that "
            "calls it (AttnProcessor2_0)"
        )


@contextmanager
def _tapped(model: nn.Module, points: Sequence[Point], take: Callable[[Point, Any], None]) -> Iterator[nn.Module]:
    """A model to run in place of `model` that reports each point to `take`."""
    above = [module for point in points for module in _ancestors(model, point.path)]
    # An ancestor's forward is bound to the original (offloading wrappers do that), so the hooks have to sit there too.
    copies = {} if any(_runs_elsewhere(module) for module in above) else {"": shallow_copy(model)}
    report = take if copies else _in_this_thread(take)
    with ExitStack() as undo:
        for point in points:
            module = copy_along(copies, point.path) if copies else _module(model, point.path)
            undo.callback(_hook(module, point, report))
        yield copies.get("", model)


def _in_this_thread(call: Callable[..., None]) -> Callable[..., None]:
    """What does nothing in other threads, which may be running the same module."""
    here = threading.get_ident()
    return lambda *args: call(*args) if threading.get_ident() == here else None


def _hook(module: nn.Module, point: Point, take: Callable[[Point, Any], None]) -> Callable[[], None]:
    """Have `module` report `point` whenever it runs; returns what undoes that."""
    if point.side == "attention":
        return _watch(module, lambda attended: take(point, attended))
    if point.side == "output":
        return module.register_forward_hook(lambda module, args, output: take(point, output)).remove

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if point.side == "call":
            take(point, (module, args, kwargs))
        else:
            take(point, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(called, with_kwargs=True).remove


def _watch(module: nn.Module, seen: Callable[[Attended], None]) -> Callable[[], None]:
    """Watch the attention in each call of `module`; returns what undoes that.

    Around the call, since a processor in the place of the module's own would need its signature.
    """
    active: list[Watch] = []

    def leave(*_: Any) -> None:
        if active:
            active.pop().__exit__(None, None, None)

    enter = _in_this_thread(lambda *_: active.append(Watch(seen).__enter__()))
    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(_in_this_thread(leave), always_call=True)

    def undo() -> None:
        leave()  # an interrupt from the keyboard passes by the hook
        before.remove()
        after.remove()

    return undo


_DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


def shallow_copy(module: nn.Module) -> nn.Module:
    """A new module object with the same children and parameters, and dicts of its own to hang hooks and copies in."""
    new = module.__class__.__new__(module.__class__)
    vars(new).update(vars(module))
    vars(new).update({name: vars(module)[name].copy() for name in _DICTS})
    vars(new)["_compiled_call_impl"] = None  # compiled calls are bound to the original and would pass by the copy
    return new


def copy_along(copies: dict[str, nn.Module], path: str) -> nn.Module:
    """Copy each module from the root to `path` that is not yet in `copies`; returns the copy at `path`."""
    if path not in copies:
        above, _, name = path.rpartition(".")
        parent = copy_along(copies, above)
        parent._modules[name] = copies[path] = shallow_copy(parent._modules[name])  # type: ignore[arg-type]
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
