"""Options that several commands of a group share, written once."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

SHARED = "shared"


def sharing(options: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, after its own options, those of the function `options`, whose result it gets as `shared`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        theirs = signature(options).parameters
        own = [one for name, one in signature(command).parameters.items() if name != SHARED]

        def run(**given: Any) -> None:
            shared = options(**{name: given.pop(name) for name in theirs})
            command(**given, shared=shared)

        found = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*own, *theirs.values())]
        run.__signature__ = Signature(found)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in found}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
