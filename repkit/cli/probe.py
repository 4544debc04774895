"""A probe on stored features, and its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repkit.cli.options import HeadName, Json, Store
from repkit.cli.printing import print_json

if TYPE_CHECKING:
    from repkit.tasks.probe import ProbeReport


def probe(
    store: Store,
    head: Annotated[HeadName, typer.Option(help="solved: ridge, logistic, knn; trained by SGD: the others")] = "ridge",
    key: Annotated[list[str] | None, typer.Option(help="taps to compare; default: all in the store")] = None,
    seed: Annotated[int, typer.Option(help="of the split, where the store has none, and of training")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the training images; default 20")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="learning rates that compete; repeatable")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="of the layers of mlp and attention; default 256")] = None,
    device: Annotated[str | None, typer.Option(help="to train on: cpu, cuda, cuda:1, mps")] = None,
    picture: Annotated[Path | None, typer.Option(help="confusion matrix; default: STORE-confusion.png")] = None,
    as_json: Json = False,
) -> None:
    """Fit a probe on the stored features of labelled images.

    Validation data chooses the tap and the hyper-parameter; test data is used once, to report. Heads that are trained
    also read maps (extract --pool none); attention needs them, or a pooling of at least 2x2.
    """
    from repkit.progress import Progress
    from repkit.store import FeatureStore
    from repkit.tasks.building import check_device
    from repkit.tasks.pictures import confusion_picture, save
    from repkit.tasks.probe import TRAINED, Training, probe_store

    if device is not None:
        check_device(device)
    given = {"epochs": epochs, "width": width, "device": device}
    settings = {name: value for name, value in given.items() if value is not None}
    training = Training(seed=seed, **settings) if head in TRAINED or settings else None
    with Progress("probe", unit="epochs" if head in TRAINED else "taps") as progress:
        report = probe_store(
            FeatureStore(store), head=head, keys=key, seed=seed, lrs=lr, training=training, progress=progress
        )
    title = f"{report.key}, {report.head}: {report.test:.1%}"
    path = picture or store.parent / f"{store.resolve().name}-confusion.png"
    save(confusion_picture(report.confusion, report.classes, title), path)
    if as_json:
        print_json(report.to_json() | {"picture": str(path)})
        return
    _print_report(report)
    print(f"\nconfusion matrix: {path}")


def _print_report(report: "ProbeReport") -> None:
    splits, (low, high) = report.splits, report.interval
    counts = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test"
    print(f"{report.head} on {counts} images of {len(report.classes)} classes")
    print(f"({splits.source})\n")
    ranked = sorted(report.validation.items(), key=lambda item: -item[1])
    width = max(len(name) for name in ["validation accuracy", *report.validation, *report.classes])
    print("validation accuracy")
    for name, value in ranked:
        print(f"{name:{width}}  {value:7.2%}{'  <- chosen' if name == report.key else ''}")
    print(f"\ntest accuracy of {report.key}, {report.chosen.name} = {report.chosen.value:g}")
    print(f"{'all':{width}}  {report.test:7.2%}  of {len(splits.test)}, 95 % interval {low:.2%} to {high:.2%}")
    for score in report.per_class:
        share = "no test images" if score.accuracy is None else f"{score.accuracy:7.2%}  of {score.n}"
        print(f"{report.classes[score.label]:{width}}  {share}")
