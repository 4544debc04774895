"""Reading of recipes without a Trainer: a yaml file and options into the arguments of a function."""

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import auto_cli


def with_config(args: Sequence[str]) -> list[str]:
    """`FILE --option value` as `--config FILE --option value`."""
    given = list(args)
    return ["--config", *given] if given and not given[0].startswith("-") else given


def call(function: Callable[..., Any], args: Sequence[str]) -> Any:
    """Call a function with `[FILE] [--option value ...]`; SystemExit, after a usage message, for what does not fit."""
    return auto_cli(function, args=with_config(args), prog="repkit fit", as_positional=False)
