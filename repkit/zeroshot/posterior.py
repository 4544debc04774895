"""Posterior: from denoising errors to the probability of each class, by Bayes' rule."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from scipy.special import ndtri, stdtrit
from torch import Tensor

from repkit.zeroshot.confidence import top_probability
from repkit.zeroshot.errortable import ErrorTable, Label
from repkit.zeroshot.evaluating import LOSSES

Mixture = Literal["logsumexp", "best"]


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the denoising errors say about each image's class; tensors on the CPU, in the order of `classes`.

    scores: weighted errors, summed over dimensions and averaged over levels, so lower is likelier; a class that was
    given up early has the best one's score plus their paired difference where both were evaluated. standard_errors: of
    the score's difference to the best class, such that 1.96 of them are a 95 % interval; 0 for the best class itself.
    evaluations: how often the network ran for each image, all classes together. decided: whether the strategy stopped
    because it was sure. calibrated: whether the temperature was fitted on labelled images, for these classes and
    evaluations; where it was not, probabilities are mostly far too sure, and only their order counts. That goes for the
    elbo at temperature 1 too: it is a bound on the likelihood, and calibrated only for a perfect denoiser.
    """

    log_posterior: Float64[Tensor, "b k"]
    scores: Float64[Tensor, "b k"]
    standard_errors: Float64[Tensor, "b k"]
    evaluations: Int[Tensor, "b"]
    decided: Bool[Tensor, "b"]
    classes: tuple[Label, ...]
    calibrated: bool
    weighting: str
    loss: str = "l2"
    temperature: float = 1.0

    @property
    def confidence(self) -> Float64[Tensor, "b"]:
        """The probability that infinitely many noises would not change the likeliest class: no doubt of the model's."""
        return top_probability(self.log_posterior, self.standard_errors / self.temperature)

    @property
    def probabilities(self) -> Float64[Tensor, "b k"]:
        """p(class | image); rows sum to 1."""
        return self.log_posterior.exp()

    @property
    def labels(self) -> list[Label]:
        """The likeliest class of each image, as given in `classes`."""
        return [self.classes[index] for index in self.log_posterior.argmax(1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[Label, float]]]:
        """For each image the k likeliest classes (all, if there are fewer) with probabilities, likeliest first."""
        values, indices = self.probabilities.topk(min(k, len(self.classes)), dim=1)
        return [
            [(self.classes[index], value) for index, value in zip(row, of, strict=True)]
            for row, of in zip(indices.tolist(), values.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Rule:
    """How errors become a posterior: log p(c|x) = log_prior_c + bias_c - score_c / temperature - logsumexp.

    weights: one a level. mixture: a class with several prompts is their even mixture ("logsumexp"), or its best prompt.
    """

    weights: Float64[np.ndarray, "n"]
    log_prior: Float64[Tensor, "k"]
    bias: Float64[Tensor, "k"]
    temperature: float = 1.0
    calibrated: bool = False
    weighting: str = "train"
    loss: str = "l2"
    mixture: Mixture = "logsumexp"

    def evidence(self, errors: Float64[np.ndarray, "*b n 3"]) -> Float64[np.ndarray, "*b n"]:
        """Weighted errors, whose mean over levels is the score."""
        return self.weights * errors[..., LOSSES.index(self.loss)]

    def scores(self, table: ErrorTable) -> Float64[Tensor, "b k"]:
        """The score of each class at this temperature."""
        return self._of_classes(table)[0]

    def posterior(self, table: ErrorTable) -> Posterior:
        """The posterior of each image of the table."""
        scores, spread = self._of_classes(table)
        return Posterior(
            log_posterior=log_posterior(scores, self.log_prior + self.bias, self.temperature),
            scores=scores,
            standard_errors=spread,
            evaluations=torch.from_numpy(table.evaluations),
            decided=torch.from_numpy(table.decided),
            classes=table.classes,
            calibrated=self.calibrated,
            weighting=self.weighting,
            loss=self.loss,
            temperature=self.temperature,
        )

    def _of_classes(self, table: ErrorTable) -> tuple[Float64[Tensor, "b k"], Float64[Tensor, "b k"]]:
        found = [condition_scores(self.evidence(errors)) for errors in table.errors]
        scores, spread = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        owner, count = torch.from_numpy(table.owner), len(table.classes)
        if len(owner) == count:
            return scores, spread
        own = [(owner == index).nonzero()[:, 0] for index in range(count)]
        best = [scores[:, rows].min(1) for rows in own]
        errors = [spread[:, rows].gather(1, low.indices[:, None])[:, 0] for rows, low in zip(own, best, strict=True)]
        if self.mixture == "best":
            return torch.stack([low.values for low in best], 1), torch.stack(errors, 1)
        likelihoods = [(-scores[:, rows] / self.temperature).logsumexp(1) - np.log(len(rows)) for rows in own]
        return -self.temperature * torch.stack(likelihoods, 1), torch.stack(errors, 1)


def condition_scores(
    evidence: Float64[np.ndarray, "j n"],
) -> tuple[Float64[np.ndarray, "j"], Float64[np.ndarray, "j"]]:
    """Each condition's score, and the standard error of its difference to the best one.

    A condition that was given up is compared with the best one at the levels where both were evaluated, since the
    errors of one level say nothing of another's. One that was never evaluated has an infinite score.
    """
    known = ~np.isnan(evidence)
    counts = known.sum(1)
    means = np.where(counts > 0, np.nansum(evidence, 1) / np.maximum(counts, 1), np.inf)
    best = int(np.where(counts == counts.max(), means, np.inf).argmin())
    differences = evidence - evidence[best]
    scores, spread = np.full(len(evidence), np.inf), np.full(len(evidence), np.inf)
    for row in np.nonzero(counts)[0]:
        shared = differences[row][known[row] & known[best]]
        scores[row] = means[best] + shared.mean() if len(shared) else np.inf
        spread[row] = standard_error(shared)
    return scores, spread


def standard_error(differences: Float64[np.ndarray, "n"]) -> float:
    """Of the mean of one draw from each of n strata, in their order; infinite for fewer than 2.

    From successive differences, which the trend over the strata, no error of the mean, hardly enters; widened so that
    1.96 of it are a 95 % interval even where few strata carry the noise (where two or three do, it covers some 92 %).
    """
    squares = np.diff(differences) ** 2
    if not squares.any():
        return 0.0 if len(squares) else float("inf")
    shares = np.full(len(squares), 0.5)
    shares[[0, -1]] = 1  # the first and the last draw enter one difference, all others two
    terms = shares * squares
    # Welch and Satterthwaite's, where neighbours share a draw, which makes them worth 2/3 as many
    freedom = 2 * terms.sum() ** 2 / (terms**2).sum()
    widened = stdtrit(freedom, 0.975) / ndtri(0.975)
    return float(widened * np.sqrt(terms.sum()) / len(differences))


def log_posterior(
    scores: Float64[Tensor, "b k"], log_prior: Float64[Tensor, "k"], temperature: float
) -> Float64[Tensor, "b k"]:
    """Bayes' rule with -score/temperature as the log-likelihood."""
    return torch.log_softmax(log_prior - scores / temperature, dim=1)
