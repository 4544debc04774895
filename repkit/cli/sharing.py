"""Options that several commands of a group share, written once."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

SHARED = "shared"


def sharing(options: Callable[..., Any], *, first: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command, after its own options, those of the function `options`, whose result it gets as `shared`.

    first: before its own. What is decorated may be a function of options itself, for others to share.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        theirs = signature(options).parameters
        own = [one for name, one in signature(command).parameters.items() if name != SHARED]

        def run(**given: Any) -> Any:
            shared = options(**{name: given.pop(name) for name in theirs if name in given})
            return command(**given, shared=shared)

        every = (*theirs.values(), *own) if first else (*own, *theirs.values())
        found = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in every]
        run.__signature__ = Signature(found)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in found}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
