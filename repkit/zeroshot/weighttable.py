"""WeightTable: a weight for each noise level, fitted beforehand to a model's errors, saved and read again."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int

from repkit.zeroshot.belonging import model_difference
from repkit.zeroshot.calibration import fit_calibration
from repkit.zeroshot.errortable import ErrorTable, Label
from repkit.zeroshot.evaluating import LOSSES
from repkit.zeroshot.levels import Levels

FORMAT = 2

Vector = Float64[np.ndarray, "n"]


@dataclass(frozen=True)
class WeightTable:
    """Weights at times t, ascending, of one model's errors, with mean 1 over the levels they were fitted at.

    name: whitened or learned. loss: of the errors they weigh. model, weights_hash, dtype: of the network. classes, as
    text, and evaluations of each: what it was fitted at. temperature: fitted on labelled images, or None; it calibrates
    the posterior of these classes at this many evaluations, and is only a guess for others. made_from: in words.
    """

    name: str
    loss: str
    t: tuple[float, ...]
    weights: tuple[float, ...]
    model: str
    weights_hash: str
    dtype: str
    classes: tuple[str, ...]
    evaluations: int
    temperature: float | None = None
    made_from: str = ""

    def at(self, levels: Levels) -> Vector:
        """The weights at other levels: log-linear between the times of the table, constant beyond them."""
        known, wanted = place(np.asarray(self.t), levels.kind), place(levels.t, levels.kind)
        return levels.density * np.exp(np.interp(wanted, known, np.log(self.weights)))

    def calibrates(self, classes: Sequence[Label], evaluations: int) -> bool:
        """Whether the temperature was fitted for the posterior of these classes, in any order, at this budget."""
        same = {*map(str, classes)} == {*self.classes} and evaluations == self.evaluations
        return self.temperature is not None and same

    def check_model(self, info: Mapping[str, Any]) -> None:
        """Raise ValueError for a network, with its model, weights_hash and dtype, that these are not the weights of."""
        if difference := model_difference(asdict(self), info):
            raise ValueError(f"no use for the {self.name} table: {difference}; fit a table for it, or take 'train'")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "WeightTable":
        """Read what `save` wrote; ValueError for another file."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cls.from_json(told, str(path))

    @classmethod
    def from_json(cls, told: Any, where: str) -> "WeightTable":
        """From what `save` writes, already parsed; ValueError for something else, which is said to be in `where`."""
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(
                f"{where} is no table of weights of format {FORMAT}; repkit classify --fit FILE writes one"
            )
        given: dict[str, Any] = {
            name: tuple(one) if isinstance(one, list) else one for name, one in told.items() if name != "format"
        }
        if odd := {*given} ^ {field.name for field in fields(cls)}:
            raise ValueError(
                f"{where}, a table of weights, lacks or has too much: {', '.join(sorted(odd))}; make it anew"
            )
        if wrong := _wrong(given):
            raise ValueError(f"{where}, a table of weights, {wrong}; make it anew with repkit classify --fit FILE")
        return cls(**given)


def whiten(table: ErrorTable, labels: Int[np.ndarray, "b"] | None = None, *, loss: str = "l2") -> WeightTable:
    """Each level's evidence divided by the standard deviation of its paired differences between conditions.

    table: errors of unlabelled images, complete. A level's difference of two conditions is that of one image and one
    noise, and over all pairs their deviation is in proportion to that from the mean over the conditions.
    labels: class numbers of the images, for the table's temperature alone.
    """
    errors = _complete(table, loss)
    variance = ((errors - errors.mean(1, keepdims=True)) ** 2).mean((0, 1))
    times, visit = np.unique(table.levels.t, return_inverse=True)  # one weight a time, however often it is visited
    pooled = np.bincount(visit, variance) / np.bincount(visit)
    if not pooled.all():
        raise ValueError(f"all classes have the same error at t={times[pooled == 0][0]:g}; nothing to whiten by")
    weights = 1 / np.sqrt(pooled)
    made = weight_table("whitened", table, times, weights, loss, f"{len(table)} images, whose labels are not used")
    return made if labels is None else with_temperature(made, table, labels)


def with_temperature(weights: WeightTable, table: ErrorTable, labels: Int[np.ndarray, "b"]) -> WeightTable:
    """The same weights with the temperature that makes the labels, class numbers, of the table's images likeliest.

    It holds for the classes and evaluations of this table.
    """
    errors = torch.from_numpy(_complete(table, weights.loss) @ weights.at(table.levels) / len(table.levels))
    even = torch.zeros(len(table.classes), dtype=torch.float64)
    temperature, _ = fit_calibration(errors, torch.from_numpy(table.owner), torch.as_tensor(labels), even)
    return replace(
        weights,
        classes=tuple(map(str, table.classes)),
        evaluations=len(table.levels),
        temperature=temperature,
        made_from=f"{weights.made_from}; temperature by {len(table)} labelled images",
    )


def weight_table(
    name: str, table: ErrorTable, times: Vector, weights: Vector, loss: str, made_from: str
) -> WeightTable:
    """Weights at ascending times as a table of the model whose errors `table` holds, scaled to mean 1 at its levels."""
    told = f"{made_from}, {len(table.classes)} classes, {len(table.levels)} evaluations each"
    model = {key: table.info[key] for key in ("model", "weights_hash", "dtype")}
    made = WeightTable(
        name,
        loss,
        tuple(times.tolist()),
        tuple(weights.tolist()),
        classes=tuple(map(str, table.classes)),
        evaluations=len(table.levels),
        made_from=told,
        **model,
    )
    mean = float(made.at(replace(table.levels, density=np.ones(len(table.levels)))).mean())
    return replace(made, weights=tuple(float(f"{one / mean:.6g}") for one in weights))


def place(t: Vector, kind: str) -> Vector:
    """Where times lie on the axis along which weights are smooth: log sigma for edm, else native time."""
    return np.log(t) if kind == "edm" else t


def _wrong(told: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a table, by the fields of WeightTable, in words; None for nothing."""
    times, weights, classes, temperature = (told[name] for name in ("t", "weights", "classes", "temperature"))
    texts = [told[name] for name in ("name", "loss", "model", "weights_hash", "dtype", "made_from")]
    if not all(isinstance(one, str) for one in texts) or told["loss"] not in LOSSES:
        return f"has a name that is no text, or a loss that is none of {', '.join(LOSSES)}"
    if not (_numbers(times) and _numbers(weights) and len(times) == len(weights) > 0):
        return "has times and weights that are not as many finite numbers"
    if any(late <= early for early, late in zip(times, times[1:], strict=False)) or min(weights) <= 0:
        return "has times that do not ascend, or weights that are not positive"
    if not isinstance(classes, tuple) or not all(isinstance(one, str) for one in classes):
        return "has classes that are no list of texts"
    if type(told["evaluations"]) is not int:
        return f"has evaluations {told['evaluations']!r}, where a whole number is meant"
    if temperature is not None and not (_numbers((temperature,)) and temperature > 0):
        return f"has temperature {temperature!r}, where a positive number or null is meant"
    return None


def _numbers(given: Any) -> bool:
    return isinstance(given, tuple) and all(type(one) in (int, float) and math.isfinite(one) for one in given)


def _complete(table: ErrorTable, loss: str) -> Float64[np.ndarray, "b j n"]:
    if loss not in LOSSES:
        raise ValueError(f"no loss {loss!r}; have {', '.join(LOSSES)}")
    errors = table.errors[..., LOSSES.index(loss)]
    if np.isnan(errors).any():
        raise ValueError("the table has gaps; make it with the uniform strategy, which leaves nothing out")
    return errors
