"""Belonging: whether what was fitted to one model's errors may be used on another's."""

from collections.abc import Mapping
from typing import Any


def model_difference(fitted: Mapping[str, Any], used: Mapping[str, Any]) -> str | None:
    """In words, how the model that something was fitted to differs from the one it is to be used on; None if it is it.

    Both hold model (a name), weights_hash and dtype. The hash is of the weights in their dtype, so that only loads of
    one dtype can be compared by it; the name has to do for others.
    """
    if fitted["dtype"] == used["dtype"]:
        same = fitted["weights_hash"] == used["weights_hash"]
    else:
        same = fitted["model"] == used["model"]
    if same:
        return None
    return f"it was fitted to {_named(fitted)}, and this is {_named(used)}"


def _named(model: Mapping[str, Any]) -> str:
    return f"{model['model']} ({model['dtype']}, weights {model['weights_hash'][:12]})"
