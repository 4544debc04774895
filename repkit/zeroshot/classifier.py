"""DiffusionClassifier: a conditional denoiser as a zero-shot classifier, by Bayes' rule on its denoising errors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Condition
from repkit.extractors import Images, prepare
from repkit.images import Resize, digest, to_uint8
from repkit.zeroshot.calibration import Calibration, fit_rule
from repkit.zeroshot.errortable import ErrorTable, Label
from repkit.zeroshot.evaluating import LOSSES, Evaluator, Outcome, Prepared, try_all
from repkit.zeroshot.levels import Spacing
from repkit.zeroshot.posterior import Mixture, Posterior
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.rules import make_rule
from repkit.zeroshot.shortlist import Retriever, listed_conditions
from repkit.zeroshot.strategies import Strategy, Uniform
from repkit.zeroshot.textcache import cache_texts
from repkit.zeroshot.weighttable import WeightTable

Classes = Sequence[Label] | Mapping[Label, Sequence[Label]]
Progress = Callable[[int, int], None]


class DiffusionClassifier:
    """Zero-shot classifier: log p(c|x) = log prior_c + bias_c - score_c / temperature - logsumexp (Li et al. 2023).

    classes: prompts, class names or indices, each a condition of the backbone; a mapping gives a class several prompts;
    with templates, such as "a photo of a {}", each class has its name put into each of them. mixture: several prompts
    are evenly mixed ("logsumexp"), or the best one speaks for its class ("best").
    strategy: what is evaluated; levels and noise are the same for all classes of an image. spacing: of the levels.
    weighting: a name of `WEIGHTINGS` or a WeightTable; None is the table that came with the model, else "train". "elbo"
    is a likelihood bound; calibrated only for a perfect denoiser.
    loss: l2, l1 or huber. prior: one positive weight a class, None for equal ones. temperature: None is 1 until `fit`,
    or the table's. bias: nats added to each class. antithetic: every noise is used with both signs, at twice the cost.
    shortlist: images -> class numbers [b m], the only ones that are looked at (`nearest_classes` makes one); the others
    get an infinite score and probability 0.
    batch_size: rows (image, level, class) in one forward; it changes results only by rounding.
    Raises ValueError for classes the backbone does not know and for values out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Classes,
        *,
        strategy: Strategy | None = None,
        templates: Sequence[str] | None = None,
        mixture: Mixture = "logsumexp",
        weighting: str | WeightTable | None = None,
        loss: str = "l2",
        spacing: Spacing = "native",
        prior: Sequence[float | int] | None = None,
        temperature: float | None = None,
        bias: Sequence[float] | None = None,
        antithetic: bool = False,
        shortlist: Retriever | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; give at least 1")
        if loss not in LOSSES:
            raise ValueError(f"no loss {loss!r}; have {', '.join(LOSSES)}")
        if mixture not in ("logsumexp", "best"):
            raise ValueError(f"no mixture {mixture!r}; have logsumexp, best")
        self.backbone, self.classes = backbone, _distinct(classes)
        self.prompts, self.owner = _prompts(classes, self.classes, templates)
        self.strategy = Racing() if strategy is None else strategy
        self.spacing, self.signs, self.shortlist = spacing, (1, -1) if antithetic else (1,), shortlist
        self.batch_size, self.seed = batch_size, seed
        self.resize = Resize(backbone.size)
        self.levels = self.strategy.levels(backbone.schedule, spacing)
        self.rule = make_rule(
            self.levels,
            self.classes,
            self.info,
            weighting=weighting,
            shipped=backbone.evidence_weights,
            loss=loss,
            prior=prior,
            temperature=temperature,
            bias=bias,
            mixture=mixture,
            prompts=len(self.prompts),
            full=shortlist is None and isinstance(self.strategy, Uniform | Racing),
        )
        self._conditions  # noqa: B018  an unknown class is told now, not after the images were decoded

    def classify(self, images: Images) -> Posterior:
        """The posterior over `classes` of each image; paths and PIL images are resized to the backbone's size."""
        return self.rule.posterior(self.measure(images))

    def predict(self, images: Images) -> list[Label]:
        """The likeliest class of each image."""
        return self.classify(images).labels

    def predict_log_proba(self, images: Images) -> Float64[Tensor, "b k"]:
        """log p(class | image)."""
        return self.classify(images).log_posterior

    def errors(self, images: Images) -> Float64[Tensor, "b j n"]:
        """The loss, summed over dimensions, for each image, prompt and level, whatever the strategy would look at.

        Raises FloatingPointError where the network returns something that is not finite.
        """
        return torch.from_numpy(self.complete.measure(images).errors[..., LOSSES.index(self.rule.loss)])

    @property
    def complete(self) -> "DiffusionClassifier":
        """The same classifier, but every class is evaluated at every level."""
        everything = copy(self)
        everything.strategy, everything.shortlist = Uniform(self.strategy.evaluations), None
        return everything

    def measure(
        self, images: Images, *, ids: Sequence[str] | None = None, progress: Progress | None = None
    ) -> ErrorTable:
        """The errors the strategy asks for, from which `rule.posterior` and replays are made.

        ids: names of the images, their numbers by default. progress: told (images done, images).
        Raises FloatingPointError where the network returns something that is not finite.
        """
        if len(images) == 0:
            raise ValueError("no images given; give at least one")
        names = tuple(str(number) for number in range(len(images))) if ids is None else tuple(ids)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} ids for {len(images)} images; give one for each")
        found: dict[int, Outcome] = {}
        for number, outcome in self._outcomes(images):
            found[number] = outcome
            if progress is not None:
                progress(len(found), len(images))
        return ErrorTable(
            ids=names,
            classes=self.classes,
            conditions=self.prompts,
            owner=self.owner,
            levels=self.levels,
            errors=np.stack([found[number].errors for number in range(len(images))]),
            decided=np.array([found[number].decided for number in range(len(images))]),
            info=self.info,
        )

    @property
    def info(self) -> dict[str, Any]:
        """What decides the errors, beside classes and levels; JSON-able."""
        return {
            "model": self.backbone.name,
            "weights_hash": self.backbone.weights_hash,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "resize": self.resize.identity,
            "spacing": self.spacing,
            "antithetic": len(self.signs) == 2,
            "seed": self.seed,
        }

    def fit(
        self, images: Images, labels: Sequence[Label] | np.ndarray | Tensor, *, bias: bool = False
    ) -> "DiffusionClassifier":
        """A classifier whose temperature makes `labels`, members of `classes`, likeliest; and whose bias, if asked for.

        Raises ValueError where the images do not determine it: too few, too easy, or classified no better than chance.
        """
        target = self.numbers(labels, len(images))
        return self.calibrated(self.complete.measure(images), target, bias=bias)

    def calibrated(
        self, table: ErrorTable, target: Int[Tensor, "b"], *, bias: bool = False, content_free: ErrorTable | None = None
    ) -> "DiffusionClassifier":
        """As `fit`, from errors that are there already; target: class numbers.

        content_free: errors of images that say nothing of the classes, whose mean scores give the bias without labels.
        """
        rule = replace(self.rule, bias=torch.zeros_like(self.rule.bias)) if bias or content_free else self.rule
        temperature, fitted = fit_rule(rule, table, target, bias=bias, content_free=content_free)
        found = copy(self)
        found.rule = replace(rule, temperature=temperature, bias=rule.bias + fitted, calibrated=True)
        return found

    @property
    def calibration(self) -> Calibration:
        """Temperature and bias as they are, with what they hold for, to be saved."""
        return Calibration(self.rule.temperature, tuple(self.rule.bias.tolist()), self.classes, self._belongs)

    def with_calibration(self, calibration: Calibration) -> "DiffusionClassifier":
        """The same classifier with a temperature and bias fitted before; ValueError where they are for another one."""
        calibration.check(self.classes, self._belongs)
        found, bias = copy(self), torch.tensor(calibration.bias, dtype=torch.float64)
        found.rule = replace(self.rule, temperature=calibration.temperature, bias=bias, calibrated=True)
        return found

    @property
    def _belongs(self) -> dict[str, Any]:
        """What decides the scores, except for the noise."""
        told = {"evaluations": self.strategy.evaluations, "prompts": list(map(str, self.prompts))}
        told |= {name: getattr(self.rule, name) for name in ("weighting", "loss", "mixture")}
        return {name: value for name, value in self.info.items() if name != "seed"} | told

    def numbers(self, labels: Sequence[Label] | np.ndarray | Tensor, count: int) -> Int[Tensor, "b"]:
        """Labels as class numbers; ValueError where they are not one of `classes` for each of `count` images."""
        given = labels if isinstance(labels, Sequence) else labels.tolist()
        if len(given) != count:
            raise ValueError(f"{len(given)} labels for {count} images; give one for each")
        if unknown := sorted({str(label) for label in given if label not in self.classes}):
            raise ValueError(f"no class {', '.join(unknown)}; have {', '.join(map(str, self.classes))}")
        return torch.tensor([self.classes.index(label) for label in given])

    def prepared(self, images: Images) -> tuple[Evaluator, Iterator[Prepared]]:
        """What computes errors, and the images as it takes them, encoded only when they are asked for."""
        self.backbone.check_frozen()
        batch = prepare(images, self.resize, self.backbone.device)
        self.backbone.check_size(*batch.images.shape[-2:])
        digests = [digest(image) for image in to_uint8(batch.images)]
        backbone, conditions = cache_texts(self.backbone, self._conditions)
        evaluator = Evaluator(
            backbone,
            conditions,
            self.prompts,
            self.levels,
            seed=self.seed,
            batch_size=self.batch_size,
            signs=self.signs,
        )
        return evaluator, evaluator.encode(batch.images, digests)

    def _outcomes(self, images: Images) -> Iterator[tuple[int, Outcome]]:
        evaluator, encoded = self.prepared(images)
        candidates = self._candidates(images)
        return try_all(
            evaluator,
            encoded,
            lambda number: self.strategy.run(candidates[number], self.owner),
            self.rule.evidence,
        )

    def _candidates(self, images: Images) -> Sequence[Int[np.ndarray, "_a"]]:
        """The conditions that each image starts with."""
        if self.shortlist is None:
            return [np.arange(len(self.prompts))] * len(images)
        return listed_conditions(self.shortlist(images), self.owner, len(images))

    @cached_property
    def _conditions(self) -> Condition:
        with torch.no_grad():
            rows = [self.backbone.condition(prompt, 1) for prompt in self.prompts]
        tensors = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
        seen: dict[bytes, int] = {}
        for index, prompt in enumerate(self.prompts):
            told = b"".join(tensor[index].float().cpu().numpy().tobytes() for tensor in tensors.values())
            if (first := seen.setdefault(told, index)) != index:
                same = self.prompts[first]
                raise ValueError(f"classes {same!r} and {prompt!r} are the same to {self.backbone.name}; drop one")
        return Condition(tensors)


def _distinct(classes: Classes) -> tuple[Label, ...]:
    if classes is None or isinstance(classes, str) or len(classes) == 0:
        hint = "; a model without class names takes indices, range(10)" if classes is None else ""
        raise ValueError(f"classes={classes!r}; give a sequence of prompts, class names or indices{hint}")
    if len(set(classes)) != len(classes):
        twice = next(label for label in classes if list(classes).count(label) > 1)
        raise ValueError(f"class {twice!r} is given twice; the posterior needs distinct classes")
    if len(classes) == 1:
        raise ValueError(f"one class, {next(iter(classes))!r}, leaves nothing to decide; give at least two")
    return tuple(classes)


def _prompts(
    given: Classes, classes: tuple[Label, ...], templates: Sequence[str] | None
) -> tuple[tuple[Label, ...], Int[np.ndarray, "j"]]:
    """Every prompt, and the number of the class it belongs to."""
    if isinstance(templates, str):
        raise ValueError(f"templates={templates!r}; give a sequence of templates, [{templates!r}] for one")
    for template in templates or ():
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}, where the class's name goes")
        if list(templates or ()).count(template) > 1:
            raise ValueError(f"template {template!r} is given twice; drop one")
    each: list[Sequence[Label]] = []
    for label in classes:
        own = given[label] if isinstance(given, Mapping) else [label]
        if isinstance(own, str) or not own:
            raise ValueError(f"class {label!r} has prompts {own!r}; give a sequence of at least one")
        filled = [template.replace("{}", str(one)) for one in own for template in templates] if templates else own
        each.append(list(filled))
    return tuple(one for own in each for one in own), np.repeat(np.arange(len(each)), [len(own) for own in each])
