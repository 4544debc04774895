"""How much do stored features know about the labels: a probe for each tap, chosen on validation data, tested once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from repkit.heads.building import KINDS, MAP_KINDS
from repkit.heads.knn import fit_knn
from repkit.heads.logistic import fit_logistic
from repkit.heads.ridge import fit_ridge
from repkit.heads.rows import Array, stored_rows
from repkit.heads.scores import ClassScore, accuracy, confusion, per_class, stratified_split, wilson_interval
from repkit.heads.selection import Choice
from repkit.heads.trained import Training, fit_trained
from repkit.pooling import grid_side
from repkit.store import FeatureStore

TRAINED = tuple(kind for kind in KINDS if kind != "difformer")  # which reads several taps; a probe compares them
# Each head with the name of its one hyper-parameter's candidates.
HEADS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "ridge": (fit_ridge, "alphas"),
    "logistic": (fit_logistic, "cs"),
    "knn": (fit_knn, "ks"),
    **{kind: (partial(fit_trained, kind), "lrs") for kind in TRAINED},
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Splits:
    """Row numbers of each part, and in words where they come from."""

    train: Int[np.ndarray, " a"]
    validation: Int[np.ndarray, " b"]
    test: Int[np.ndarray, " c"]
    source: str


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """The probe of the tap that validation data chose, and its accuracy in [0, 1] on test data, measured once."""

    head: str
    key: str
    chosen: Choice
    validation: Mapping[str, float]  # for each tap, the accuracy that chose among them
    test: float
    interval: tuple[float, float]  # 95 %, Wilson
    splits: Splits
    classes: Sequence[str]
    per_class: Sequence[ClassScore]
    confusion: Int[np.ndarray, "k k"]
    probe: Any

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        parts = {name: len(getattr(self.splits, name)) for name in ("train", "validation", "test")}
        return {
            "head": self.head,
            "key": self.key,
            "chosen": {self.chosen.name: self.chosen.value, "by": self.chosen.by},
            "validation_accuracy": dict(self.validation),
            "test_accuracy": self.test,
            "test_interval_95": list(self.interval),
            "split": parts | {"source": self.splits.source},
            "per_class": [
                {"class": self.classes[score.label], "n": score.n, "accuracy": score.accuracy}
                for score in self.per_class
            ],
            "confusion": self.confusion.tolist(),
        }


def probe_store(
    store: FeatureStore,
    *,
    head: str = "ridge",
    keys: Sequence[str] | None = None,
    seed: int = 0,
    lrs: Sequence[float] | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> ProbeReport:
    """Probe the features of a labelled store; several taps compete on validation data.

    The store's own splits are used where it has them. lrs, training: of heads that are trained. Maps are for these
    heads; attention needs them, or a pooling of at least 2x2. `progress` is told taps, or of trained heads epochs.
    Raises ValueError for missing labels, unknown heads and taps, and features that the head cannot read.
    """
    if head not in HEADS:
        raise ValueError(f"no head {head!r}; have {', '.join(HEADS)}")
    if head not in TRAINED and (lrs is not None or training is not None):
        raise ValueError(f"{head} is solved, not trained; learning rates and epochs are for {', '.join(TRAINED)}")
    if head in TRAINED:
        training = training or Training(seed=seed)
    keys = list(store.keys if keys is None else keys)
    if unknown := [key for key in keys if key not in store.keys]:
        raise ValueError(f"no features {', '.join(unknown)} in this store; have {', '.join(store.keys)}")
    classes, labels = read_labels(store.table["label"].to_pylist())
    splits = split_rows(labels, store.table["split"].to_pylist(), seed)
    features = {key: _readable(store, key, head) for key in keys}
    return probe_features(features, labels, classes, splits, head, progress, lrs=lrs, training=training)


def probe_features(
    features: Mapping[str, Array],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    splits: Splits,
    head: str = "ridge",
    progress: Progress | None = None,
    *,
    lrs: Sequence[float] | None = None,
    training: Training | None = None,
) -> ProbeReport:
    """Fit one probe a tap on the training rows, choose by validation, refit on both, and test that one."""
    if head not in HEADS:
        raise ValueError(f"no head {head!r}; have {', '.join(HEADS)}")
    fit, path = HEADS[head]
    parts = len(features) + 1
    validation: dict[str, float] = {}
    choices: dict[str, Choice] = {}
    for done, (key, x) in enumerate(features.items()):
        held = (x[splits.validation], labels[splits.validation])
        settings = _settings(head, training, progress, done, parts) | ({} if lrs is None else {path: lrs})
        fitted = fit(x[splits.train], labels[splits.train], validation=held, n_classes=len(classes), **settings)
        choices[key] = fitted.chosen
        validation[key] = max(fitted.chosen.scores)
        if progress and head not in TRAINED:
            progress(done + 1, len(features))
    best = max(validation, key=lambda key: validation[key])
    x, chosen = features[best], choices[best]
    seen = np.concatenate([splits.train, splits.validation])
    # Both parts train the final probe, at the value already chosen; one candidate leaves nothing to choose.
    settings = _settings(head, training, progress, len(features), parts) | {path: [chosen.value]}
    probe = fit(x[seen], labels[seen], n_classes=len(classes), **settings)
    truth, predicted = labels[splits.test], probe.predict(x[splits.test])
    return ProbeReport(
        head=head,
        key=best,
        chosen=chosen,
        validation=validation,
        test=accuracy(truth, predicted),
        interval=wilson_interval(int((truth == predicted).sum()), len(truth)),
        splits=splits,
        classes=classes,
        per_class=per_class(truth, predicted, len(classes)),
        confusion=confusion(truth, predicted, len(classes)),
        probe=probe,
    )


def _settings(head: str, training: Training | None, progress: Progress | None, part: int, parts: int) -> dict[str, Any]:
    """How a trained head is trained, and whom it tells: its epochs are one part of several equal ones."""
    if head not in TRAINED:
        return {}
    if progress is None:
        return {"training": training}
    return {"training": training, "progress": lambda done, total: progress(part * total + done, parts * total)}


def read_labels(names: Sequence[str | None]) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """The classes in alphabetical order, and the number of each row's class."""
    missing = sum(name is None for name in names)
    if missing:
        raise ValueError(
            f"{missing} of {len(names)} images have no label; export a folder of class folders, or a csv or parquet "
            "list with a label column"
        )
    classes = sorted(set(filter(None, names)))
    number = {name: index for index, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names if name is not None], dtype=np.int64)


def split_rows(labels: ArrayLike, names: Sequence[str | None], seed: int = 0) -> Splits:
    """Train, validation and test rows: the store's own where it has them, else fixed shares of each class.

    Without a test split, `val` is what results are reported on, and validation rows come out of `train`.
    """
    y, split = np.asarray(labels), np.array([name or "" for name in names])
    rows = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
    if not len(rows["train"]):
        if len(rows["test"]) or len(rows["val"]):
            raise ValueError(f"the store has the splits {', '.join(sorted(set(split)))} but no train; a probe needs it")
        seen, test = stratified_split(y, 0.2, seed)
        train, validation = stratified_split(y[seen], 0.2, seed + 1)
        return Splits(seen[train], seen[validation], test, f"64/16/20 % of each class, seed {seed}")
    if len(rows["test"]) and len(rows["val"]):
        return Splits(rows["train"], rows["val"], rows["test"], "train, val and test of the store")
    test = rows["test"] if len(rows["test"]) else rows["val"]
    if not len(test):
        raise ValueError("the store has a train split and neither val nor test; a probe needs one to report on")
    name = "test" if len(rows["test"]) else "val"
    train, validation = stratified_split(y[rows["train"]], 0.2, seed)
    source = f"{name} of the store; validation is 20 % of each class of train, seed {seed}"
    return Splits(rows["train"][train], rows["train"][validation], test, source)


def _readable(store: FeatureStore, key: str, head: str) -> Array:
    """A tap's features in the form that the head reads."""
    shape, how = store.taps[key]["shape"], store.identity["pool"]
    if head not in TRAINED:
        if len(shape) != 1:
            raise ValueError(
                f"{key} is stored as maps {tuple(shape)}; export with --pool mean or --pool 2x2 to probe it with {head}"
            )
        return store.array(key)
    if head not in MAP_KINDS or len(shape) == 3:
        return stored_rows(store, key)
    side = 1 if how in ("mean", "max", "gem") else grid_side(how)
    if side < 2:
        raise ValueError(f"{head} needs maps, and {key} is pooled by {how}; export with --pool none or --pool 2x2")
    return stored_rows(store, key, fold=(shape[0] // side**2, side, side))
