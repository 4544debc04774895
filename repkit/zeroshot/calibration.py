"""Calibration: what a score is worth in nats, and what each class has too much of it, fitted on labelled images."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from repkit.zeroshot.belonging import model_difference
from repkit.zeroshot.errortable import ErrorTable, Label
from repkit.zeroshot.posterior import Rule, log_posterior

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """A temperature and a bias in nats for each class, with what they hold for.

    belongs: model, weights_hash and dtype, and whatever else decides the scores (weighting, loss, evaluations, ...).
    """

    temperature: float
    bias: tuple[float, ...]
    classes: tuple[Label, ...]
    belongs: Mapping[str, Any]

    def check(self, classes: tuple[Label, ...], belongs: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, where scores are of other classes or made another way."""
        told = dict(belongs)
        wrong = [] if self.classes == classes else [f"classes {_some(self.classes)}, not {_some(classes)}"]
        wrong += [difference] if (difference := model_difference(self.belongs, told)) else []
        by_model = ("model", "weights_hash", "dtype")
        for name in sorted({*self.belongs, *told} - {*by_model}):
            if self.belongs.get(name) != told.get(name):
                wrong.append(f"{name} {self.belongs.get(name)}, not {told.get(name)}")
        if wrong:
            raise ValueError(f"the calibration is for {'; '.join(wrong)}; fit one for this classifier")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote; ValueError for another file."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if told.pop("format") != FORMAT:
                raise KeyError("format")
            given: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in told.items()}
            return cls(**given)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no calibration of format {FORMAT}; Calibration.save writes one") from error


def fit_temperature(scores: Float64[Tensor, "b k"], labels: Int[Tensor, "b"], log_prior: Float64[Tensor, "k"]) -> float:
    """The temperature of the least negative log-likelihood, to 1e-9 of itself.

    Raises ValueError where that is 0 or infinite.
    """
    own = scores.gather(1, labels[:, None])[:, 0]

    def slope(log_t: float) -> float:
        """Derivative of the negative log-likelihood by 1/T; it only falls with T, since that is convex in 1/T."""
        p = log_posterior(scores, log_prior, np.exp(log_t)).exp()
        return float((own - (p * scores).sum(1)).mean())

    spread = float((scores - scores.min(1, keepdim=True).values).mean())
    low, high = (np.log(max(spread, 1e-300) * factor) for factor in (1e-4, 1e4))
    if not slope(low) > 0 > slope(high):
        raise ValueError(
            f"{len(labels)} labelled images do not determine a temperature: either all are classified right at any, "
            "or no better than chance; give more, and harder or right ones"
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.exp(low))


def fit_calibration(
    scores: Float64[Tensor, "b j"],
    owner: Int[Tensor, "j"],
    labels: Int[Tensor, "b"],
    log_prior: Float64[Tensor, "k"],
    *,
    bias: bool = False,
    ridge: float = 1.0,
) -> tuple[float, Float64[Tensor, "k"]]:
    """Temperature and bias in nats (0 unless asked for) of the most likely labels.

    scores: of conditions; owner[j] is the class of condition j, and a class with several is their even mixture. ridge:
    a bias is taken to be drawn from a normal distribution of variance 1/ridge, which also makes their sum 0. With one
    condition a class the loss is convex in 1/temperature and bias, so there is one answer.
    Raises ValueError where the images do not determine the temperature.
    """
    best = torch.stack([scores[:, owner == index].amin(1) for index in range(len(log_prior))], 1)
    start = fit_temperature(best, labels, log_prior)
    if len(owner) == len(log_prior) and not bias:
        return start, torch.zeros_like(log_prior)

    def loss(fitted: Float64[Tensor, "p"]) -> Tensor:
        logits = mixed(-scores * (fitted[0].exp() / start), owner, len(log_prior)) + log_prior
        logits = logits + fitted[1:] if bias else logits
        penalty = ridge / 2 * (fitted[1:] ** 2).sum() / len(labels)
        return torch.nn.functional.cross_entropy(logits, labels) + penalty

    fitted = minimise(loss, torch.zeros(1 + len(log_prior) * bias, dtype=torch.float64))
    return start / float(fitted[0].exp()), fitted[1:] if bias else torch.zeros_like(log_prior)


def fit_rule(
    rule: Rule,
    table: ErrorTable,
    labels: Int[Tensor, "b"],
    *,
    bias: bool = False,
    content_free: ErrorTable | None = None,
    ridge: float = 1.0,
) -> tuple[float, Float64[Tensor, "k"]]:
    """Temperature of `rule`, and the bias in nats to be added to its own, from a table of labelled images.

    content_free: errors of images that say nothing of the classes; these, not the labels, then give the bias.
    """
    if bias and content_free is not None:
        raise ValueError("bias=True and content_free= both give the bias; take one of them")
    even = rule.mixture == "logsumexp"  # a best prompt speaks for its class whatever the temperature
    scores = condition_means(rule, table) if even else rule.scores(table)
    owner = torch.from_numpy(table.owner) if even else torch.arange(len(table.classes))
    prior = rule.log_prior + rule.bias
    if content_free is None:
        return fit_calibration(scores, owner, labels, prior, bias=bias, ridge=ridge)
    offset = content_free_offset(rule.scores(content_free))
    temperature, _ = fit_calibration(scores - offset[owner], owner, labels, prior)
    return temperature, offset / temperature


def condition_means(rule: Rule, table: ErrorTable) -> Float64[Tensor, "b j"]:
    """The score of each condition; ValueError for a table with gaps, in which scores would not be comparable."""
    evidence = rule.evidence(table.errors)
    if np.isnan(evidence).any():
        raise ValueError("the table has gaps; make it with the uniform strategy, which leaves nothing out")
    return torch.from_numpy(evidence.mean(2))


def content_free_offset(scores: Float64[Tensor, "b k"]) -> Float64[Tensor, "k"]:
    """What each class's score is above the mean of all, over images that say nothing of the classes.

    They are noise, or unlabelled images in which all classes are as frequent. Divided by the temperature it is a bias
    that makes all classes' mean scores equal (Zhao et al. 2021 do so for prompts of language models).
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores with gaps; take errors of every class at every level (the uniform strategy)")
    return scores.mean(0) - scores.mean()


def mixed(logits: Float64[Tensor, "b j"], owner: Int[Tensor, "j"], count: int) -> Float64[Tensor, "b k"]:
    """Log-likelihoods of conditions as those of `count` classes, each the even mixture of its own."""
    if len(owner) == count:
        return logits
    own = [logits[:, owner == index] for index in range(count)]
    return torch.stack([one.logsumexp(1) - np.log(one.shape[1]) for one in own], 1)


def minimise(loss: Callable[[Float64[Tensor, "p"]], Tensor], start: Float64[Tensor, "p"]) -> Float64[Tensor, "p"]:
    """Where a smooth loss is least, by L-BFGS from `start`; the same each time."""
    at = start.clone().requires_grad_()
    steps = torch.optim.LBFGS(
        [at], max_iter=100, tolerance_grad=1e-8, tolerance_change=1e-11, history_size=20, line_search_fn="strong_wolfe"
    )

    def evaluate() -> float:
        steps.zero_grad()
        value = loss(at)
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        steps.step(evaluate)
    return at.detach()


def _some(classes: tuple[Label, ...]) -> str:
    return ", ".join(map(str, classes[:5])) + (f", ... ({len(classes)})" if len(classes) > 5 else "")
