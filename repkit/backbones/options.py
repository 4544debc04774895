"""Options of a checkpoint, for what its weights do not tell, each checked by what it takes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch


@dataclass(frozen=True)
class Kind:
    """What an option takes: in words, and as a test of a value."""

    words: str
    takes: Callable[[Any], bool]


COUNT = Kind(
    "a whole number of at least 1", lambda value: isinstance(value, Integral) and value is not True and int(value) >= 1
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _is_numbers(value: Any) -> bool:
    try:
        torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, bool)


TEXTS = Kind('a list of texts, such as ["cat", "dog"]', _is_texts)
NUMBERS = Kind("a number, or a list of them", _is_numbers)


def one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def check_options(config: Mapping[str, Any] | None, kinds: Mapping[str, Kind], name: str) -> dict[str, Any]:
    """The options that `config` gives; None is as if not given.

    Raises ValueError for an option that is none of `kinds`, and for a value that it does not take.
    """
    if unknown := sorted(set(config or {}) - set(kinds)):
        raise ValueError(
            f"no config {', '.join(unknown)} for {name}; have {', '.join(kinds)}: the weights tell the rest"
        )
    given = {key: value for key, value in (config or {}).items() if value is not None}
    for key, value in given.items():
        if not kinds[key].takes(value):
            raise ValueError(f"config {written(key, value)} given for {name}; {key} takes {kinds[key].words}")
    return given


def written(key: str, value: Any) -> str:
    """An option as the command line takes it after --config."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
