"""Plain forward hooks on every module of a network: the reference that capturing is compared with."""

from collections.abc import Callable
from typing import Any

from torch import nn


def record(network: Any, run: Callable[[], Any]) -> dict[tuple[str, str], Any]:
    """What each module was first given and gave during `run`, by (path, "input" or "output")."""
    seen: dict[tuple[str, str], Any] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.setdefault((path, "input"), args[0] if args else kwargs.get("hidden_states"))
            seen.setdefault((path, "output"), output)

        return hook

    handles = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in network.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def arguments(network: Any, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments of the network's first call during `run`, and what it returned."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    handle = network.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return calls[0]
