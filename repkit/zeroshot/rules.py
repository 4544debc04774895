"""The rule from errors to a posterior, made from what a user says of weighting, prior and temperature."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from repkit.zeroshot.belonging import model_difference
from repkit.zeroshot.errortable import Label
from repkit.zeroshot.levels import Levels
from repkit.zeroshot.posterior import Mixture, Rule
from repkit.zeroshot.weightings import weigh
from repkit.zeroshot.weighttable import WeightTable

logger = logging.getLogger("repkit")


def make_rule(
    levels: Levels,
    classes: Sequence[Label],
    info: Mapping[str, Any],
    *,
    weighting: str | WeightTable | None = None,
    shipped: Mapping[str, Any] | None = None,
    loss: str = "l2",
    prior: Sequence[float | int] | None = None,
    temperature: float | None = None,
    bias: Sequence[float] | None = None,
    mixture: Mixture = "logsumexp",
    prompts: int | None = None,
    full: bool = True,
) -> Rule:
    """The rule for errors at `levels` of the network that `info` names by model, weights_hash and dtype.

    shipped: the table that came with the model, as JSON has it, which is what weighting=None takes where its loss is
    asked for; else that is "train". prompts: of all classes together; None is one for each. full: whether answers are
    those of the full budget, as they are where every class is evaluated at every level, and by and large in a race.
    The rule is calibrated where a table's temperature was fitted for just this: its classes and evaluations.
    Raises ValueError for what does not fit the levels, the loss or the network.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; give a positive number, or leave it out")
    if weighting is None:
        weighting = _usable(shipped, loss, info) or "train"
    if isinstance(weighting, WeightTable):
        weighting.check_model(info)
        if weighting.loss != loss:
            raise ValueError(f"the {weighting.name} table is of loss {weighting.loss!r}; give that, not {loss!r}")
        weights, name = weighting.at(levels), weighting.name
    else:
        weights, name = weigh(weighting, levels, loss), weighting
    calibrated = False
    if isinstance(weighting, WeightTable) and temperature is None:
        mixed = mixture == "logsumexp" or prompts in (None, len(classes))  # as in the fit
        calibrated = full and mixed and weighting.calibrates(classes, len(levels))
        temperature = weighting.temperature
    return Rule(
        weights=weights,
        log_prior=_log_prior(prior, len(classes)),
        bias=_bias(bias, len(classes)),
        temperature=1.0 if temperature is None else float(temperature),
        calibrated=calibrated,
        weighting=name,
        loss=loss,
        mixture=mixture,
    )


def _usable(shipped: Mapping[str, Any] | None, loss: str, info: Mapping[str, Any]) -> WeightTable | None:
    """The table that came with the model, unless it is of another loss, or the model has other weights by now."""
    table = WeightTable.from_json(shipped, "the model's table") if shipped else None
    if table is None or table.loss != loss:
        return None
    if difference := model_difference(asdict(table), info):
        logger.warning("the %s weights that came with the model are not used: %s", table.name, difference)
        return None
    return table


def _log_prior(prior: Sequence[float | int] | None, count: int) -> Float64[Tensor, "k"]:
    weights = torch.ones(count, dtype=torch.float64) if prior is None else torch.tensor(prior, dtype=torch.float64)
    if weights.shape != (count,) or not (weights > 0).all() or not torch.isfinite(weights.sum()):
        raise ValueError(f"prior={prior} for {count} classes; give one positive number for each, with a finite sum")
    return weights.log() - weights.sum().log()


def _bias(bias: Sequence[float] | None, count: int) -> Float64[Tensor, "k"]:
    values = torch.zeros(count, dtype=torch.float64) if bias is None else torch.tensor(bias, dtype=torch.float64)
    if values.shape != (count,) or not torch.isfinite(values).all():
        raise ValueError(f"bias={bias} for {count} classes; give one number for each")
    return values
