"""Class labels as conditions, for networks that embed an integer."""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from repkit.backbones.conditions import Cond


def class_labels(
    cond: Cond, batch: int, *, names: Sequence[str] | None, count: int, null: int | None, model: str
) -> Tensor:
    """Labels [b] for one condition or one each: an index below `count`, a class name, or None for the null class.

    Raises ValueError for what is neither, and for None where the network has no null class.
    """
    each = [cond] * batch if cond is None or isinstance(cond, str | int) else list(cond)
    if len(each) != batch:
        raise ValueError(f"{len(each)} conditions for {batch} images; give one for all or one for each")
    return torch.tensor([_label(one, names, count, null, model) for one in each], dtype=torch.long)


def _known(cond: str, names: Sequence[str] | None, count: int) -> str:
    if names is None:
        return f"no names, only indices 0 ... {count - 1}"
    if len(names) <= 20:
        return ", ".join(names)
    return f"{len(names)} names, near it: {', '.join(get_close_matches(cond, names, n=5, cutoff=0.4)) or 'none'}"


def _label(cond: str | int | None, names: Sequence[str] | None, count: int, null: int | None, model: str) -> int:
    if cond is None:
        if null is None:
            raise ValueError(f"{model} needs a class and has no null class; give cond=, an index below {count}")
        return null
    if isinstance(cond, str):
        if names is None or cond not in names:
            raise ValueError(f"no class {cond!r} in {model}; have {_known(cond, names, count)}")
        return names.index(cond)
    if not 0 <= cond < count:
        raise ValueError(f"no class {cond} in {model}; have 0 ... {count - 1}")
    return int(cond)
