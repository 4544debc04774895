"""DiffusionClassifier: a conditional denoiser as a zero-shot classifier, by Bayes' rule on its denoising errors."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float64, Int
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.extractors import Images, prepare
from repkit.images import Resize, digest, to_uint8
from repkit.noise import noise_like
from repkit.precision import full_float32

Label = str | int

WEIGHTINGS = ("train",)  # "train": the network's own target, uniform native time, as it was trained


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the denoising errors say about each image's class; tensors on the CPU, in the order of `classes`.

    scores: squared errors, summed over dimensions and averaged over times, so lower is likelier. standard_errors: of
    the score's difference to the best class, over times taken as independent draws; 0 for the best class itself.
    evaluations: how often the network ran for each image, all classes together. calibrated: whether the temperature
    was fitted on labelled images; where it was not, probabilities are mostly far too sure, and only their order counts.
    """

    log_posterior: Float64[Tensor, "b k"]
    scores: Float64[Tensor, "b k"]
    standard_errors: Float64[Tensor, "b k"]
    evaluations: Int[Tensor, "b"]
    classes: tuple[Label, ...]
    calibrated: bool
    weighting: str

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


class DiffusionClassifier:
    """Zero-shot classifier: log p(c|x) = log prior_c - score_c / temperature - logsumexp (Li et al. 2023).

    classes: prompts, class names or indices, each a condition of the backbone. evaluations: times for each class, one
    from the middle of each of so many equal strata; times and noise are the same for all classes of an image.
    weighting: "train", the network's own target at uniform native time. prior: one positive weight a class, None for
    equal ones. temperature: None is 1 until `fit`. batch_size: rows (image, time, class) in one forward; it changes
    results only by rounding.
    Raises ValueError for classes the backbone does not know and for values out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[Label],
        *,
        evaluations: int = 32,
        weighting: str = "train",
        prior: Sequence[float | int] | None = None,
        temperature: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"no weighting {weighting!r}; have {', '.join(WEIGHTINGS)}")
        if evaluations < 2 or batch_size < 1:
            raise ValueError(f"evaluations={evaluations}, batch_size={batch_size}; give at least 2 and 1")
        if temperature is not None and not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}; give a positive number, or None and call fit")
        self.backbone, self.classes = backbone, _distinct(classes)
        self.weighting, self.batch_size, self.seed = weighting, batch_size, seed
        self.temperature, self.calibrated = 1.0 if temperature is None else float(temperature), False
        self.log_prior = _log_prior(prior, len(self.classes))
        self.resize = Resize(backbone.size)
        self.times = stratified_times(backbone, evaluations)
        # targets are converted from x0, because eps leaves v and flow undetermined at a step without signal
        self._of_x0 = replace(backbone.schedule, prediction="x0")
        self._conditions  # noqa: B018  an unknown class is told now, not after the images were decoded

    def classify(self, images: Images) -> Posterior:
        """The posterior over `classes` of each image; paths and PIL images are resized to the backbone's size."""
        errors = self.errors(images)
        scores = errors.mean(2)
        return Posterior(
            log_posterior=log_posterior(scores, self.log_prior, self.temperature),
            scores=scores,
            standard_errors=_paired_standard_errors(errors),
            evaluations=torch.full((len(errors),), errors[0].numel()),
            classes=self.classes,
            calibrated=self.calibrated,
            weighting=self.weighting,
        )

    def predict(self, images: Images) -> list[Label]:
        """The likeliest class of each image."""
        return self.classify(images).labels

    def predict_log_proba(self, images: Images) -> Float64[Tensor, "b k"]:
        """log p(class | image)."""
        return self.classify(images).log_posterior

    def fit(self, images: Images, labels: Sequence[Label] | np.ndarray | Tensor) -> "DiffusionClassifier":
        """A classifier whose temperature minimises the negative log-likelihood of `labels`, members of `classes`.

        Raises ValueError where the images do not determine it: too few, too easy, or classified no better than chance.
        """
        given = labels if isinstance(labels, Sequence) else labels.tolist()
        if len(given) != len(images):
            raise ValueError(f"{len(given)} labels for {len(images)} images; give one for each")
        if unknown := sorted({str(label) for label in given if label not in self.classes}):
            raise ValueError(f"no class {', '.join(unknown)}; have {', '.join(map(str, self.classes))}")
        target = torch.tensor([self.classes.index(label) for label in given])
        fitted = copy(self)
        fitted.temperature = fit_temperature(self.errors(images).mean(2), target, self.log_prior)
        fitted.calibrated = True
        return fitted

    @torch.no_grad()
    def errors(self, images: Images) -> Float64[Tensor, "b k n"]:
        """||target - prediction||^2, summed over dimensions, for each image, class and time of `times`.

        Raises FloatingPointError where the network returns something that is not finite.
        """
        if len(images) == 0:
            raise ValueError("no images given; give at least one")
        self.backbone.check_frozen()
        batch = prepare(images, self.resize, self.backbone.device)
        self.backbone.check_size(*batch.images.shape[-2:])
        digests = [digest(image) for image in to_uint8(batch.images)]
        counts = (len(batch.images), len(self.times), len(self.classes))
        rows = torch.cartesian_prod(*(torch.arange(count) for count in counts))
        plain = torch.autocast(self.backbone.device.type, enabled=False)  # a training loop's would change the values
        with plain, full_float32():
            x0 = torch.cat([self.backbone.encode(part) for part in batch.images.split(self.batch_size)])
            errors = torch.cat([self._errors_of(part, x0, digests) for part in rows.split(self.batch_size)])
        self._check_finite(errors, rows)
        return rearrange(errors, "(b n k) -> b k n", b=counts[0], n=counts[1])

    def _errors_of(
        self, rows: Int[Tensor, "r 3"], x0: Float[Tensor, "b c h w"], digests: Sequence[bytes]
    ) -> Float64[Tensor, "r"]:
        """The errors of rows (image, time, class); an (image, time) is noised once for all its classes."""
        pairs, pair_of = torch.unique_consecutive(rows[:, :2], dim=0, return_inverse=True)
        eps = torch.stack([self._eps(x0.shape[1:], digests[image], time) for image, time in pairs.tolist()]).to(x0)
        t = torch.tensor([self.times[time] for time in pairs[:, 1].tolist()], device=x0.device)
        clean = x0[pairs[:, 0]].double()  # in float64, or the target would lose digits where sigma is small
        x_t = self.backbone.schedule.add_noise(clean, eps.double(), t)
        target = self._of_x0.convert(clean, x_t, t, to=self.backbone.schedule.prediction)
        prediction = self.backbone.denoise(x_t[pair_of].to(x0), t[pair_of], self._conditions[rows[:, 2].to(x0.device)])
        return reduce((target[pair_of] - prediction) ** 2, "r c h w -> r", "sum").cpu()

    def _eps(self, shape: Sequence[int], digest: bytes, time: int) -> Float[Tensor, "c h w"]:
        t = self.times[time]
        # more evaluations than training steps repeat a step, each time with another draw
        return noise_like(shape, seed=self.seed, digest=digest, t=t, draw=self.times[:time].count(t))

    @cached_property
    def _conditions(self) -> Condition:
        with torch.no_grad():
            condition = self.backbone.condition(self.classes, len(self.classes))
        seen: dict[bytes, Label] = {}
        for index, label in enumerate(self.classes):
            told = b"".join(tensor[index].cpu().numpy().tobytes() for tensor in condition.tensors.values())
            if condition.tensors and (same := seen.setdefault(told, label)) is not label:
                raise ValueError(f"classes {same!r} and {label!r} are the same to {self.backbone.name}; drop one")
        return condition

    def _check_finite(self, errors: Float64[Tensor, "r"], rows: Int[Tensor, "r 3"]) -> None:
        bad = ~torch.isfinite(errors)
        if bad.any():
            image, time, index = rows[bad][0].tolist()
            raise FloatingPointError(
                f"{self.backbone.name} returns no finite prediction for image {image}, class {self.classes[index]!r} "
                f"at t={self.times[time]:g}; load the model with dtype=torch.bfloat16 or torch.float32"
            )


def stratified_times(backbone: Backbone, count: int) -> tuple[float, ...]:
    """Native times at the middles of `count` equal strata of the schedule's uniform time, least noise first."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    times = backbone.schedule.time_at(middles)
    assert isinstance(times, Tensor)
    return tuple(times.double().tolist())


def log_posterior(
    scores: Float64[Tensor, "b k"], log_prior: Float64[Tensor, "k"], temperature: float
) -> Float64[Tensor, "b k"]:
    """Bayes' rule with -score/temperature as the log-likelihood."""
    return torch.log_softmax(log_prior - scores / temperature, dim=1)


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


def _paired_standard_errors(errors: Float64[Tensor, "b k n"]) -> Float64[Tensor, "b k"]:
    best = errors.mean(2).argmin(1)
    difference = errors - errors[torch.arange(len(errors)), best][:, None]
    return difference.std(2) / errors.shape[2] ** 0.5


def _distinct(classes: Sequence[Label]) -> tuple[Label, ...]:
    if classes is None or isinstance(classes, str) or len(classes) == 0:
        hint = "; a model without class names takes indices, range(10)" if classes is None else ""
        raise ValueError(f"classes={classes!r}; give a sequence of prompts, class names or indices{hint}")
    if len(set(classes)) != len(classes):
        twice = next(label for label in classes if list(classes).count(label) > 1)
        raise ValueError(f"class {twice!r} is given twice; the posterior needs distinct classes")
    return tuple(classes)


def _log_prior(prior: Sequence[float | int] | None, count: int) -> Float64[Tensor, "k"]:
    weights = torch.ones(count, dtype=torch.float64) if prior is None else torch.tensor(prior, dtype=torch.float64)
    if weights.shape != (count,) or not ((weights > 0) & torch.isfinite(weights)).all():
        raise ValueError(f"prior={prior} for {count} classes; give one positive number for each")
    return (weights / weights.sum()).log()
