"""`repkit fit`: train heads on frozen features by a recipe; a killed run goes on as if it had not been.

A recipe is a yaml file, or one of repkit's own by its name, with `model` (what is trained: Probe or Segmentation),
`data` (ImageData or StoreData), `trainer` (what Lightning's Trainer takes) and `out`. Weights are the same bits in
every run on one machine's CPU at one number of threads.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from repkit.publishing import publish
from repkit.recipes import image_data, probe, segmentation, store_data  # noqa: F401 - their classes are found by name
from repkit.recipes.checkpoints import LastCheckpoint
from repkit.recipes.curves import curve_picture, curve_table
from repkit.recipes.feature_data import FeatureData
from repkit.recipes.head_training import HeadTraining
from repkit.recipes.neighbours import fit_neighbours
from repkit.recipes.pixels import fit_pixels
from repkit.recipes.reading import recipe_names, with_config
from repkit.recipes.telling import Bars, quiet
from repkit.tasks.pictures import save
from repkit.tasks.resuming import SETTINGS, claim

_FIXED = {
    "max_epochs": -1,  # the one epoch never ends: steps alone decide where a run stands
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the data share their rows themselves
    "enable_model_summary": False,
}
OTHERS = {"knn": fit_neighbours, "pixels": fit_pixels}  # recipes that Lightning's Trainer has no part in
_DEFAULTS = {"devices": 1, "log_every_n_steps": 50, **_FIXED}
_LOGS, _BOARD = "logs", "tensorboard"


class FitCLI(LightningCLI):
    """Reads a recipe and builds its parts; the trainer's steps and validations follow from the data's epochs."""

    datamodule: FeatureData
    model: HeadTraining

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--recipe", type=str, default="heads", help="heads; of other names knn and pixels")
        parser.add_argument("--out", type=str, default="fitted", help="folder for last.ckpt, logs and results")
        parser.add_argument("--threads", type=int, default=1, help="of the CPU; the weights' last bits depend on it")
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="steps between checkpoints")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config, data = self.config_init, self.datamodule
        if config.checkpoint_every < 1 or config.threads < 1:
            raise ValueError(f"checkpoint_every={config.checkpoint_every}, threads={config.threads}; give at least 1")
        torch.set_num_threads(config.threads)
        settings = dict(config.trainer)
        if changed := [name for name, value in _FIXED.items() if settings[name] != value]:
            raise ValueError(f"trainer.{changed[0]} is fixed by the recipe; set data.epochs or trainer.max_steps")
        steps = settings["max_steps"] if settings["max_steps"] > 0 else data.steps
        settings["max_steps"] = steps
        if settings["val_check_interval"] is None:
            settings["val_check_interval"] = min(steps, data.steps_in(data.validate_every))
        out = Path(config.out)
        self.checkpoint = LastCheckpoint(out, config.checkpoint_every)
        bars = [] if settings["enable_progress_bar"] is False else [Bars()]
        settings["enable_progress_bar"] = False  # Lightning's own tells on stdout, of epochs that there are none of
        settings["callbacks"] = [*(settings["callbacks"] or []), *bars, self.checkpoint]
        if settings["logger"] is None:
            settings["logger"] = [CSVLogger(out, name=_LOGS), TensorBoardLogger(out, name=_BOARD)]
        return self.trainer_class(**settings)


def parse(args: Sequence[str]) -> FitCLI:
    """The parts of a recipe: `[FILE] [--option value ...]`, the later ones winning.

    Raises SystemExit, after a usage message, for an option or a type that does not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Lightning calls jsonargparse by an old name
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # which typer has read already
        return FitCLI(
            HeadTraining,
            FeatureData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=_DEFAULTS,
            seed_everything_default=False,  # everything random has a seed of its own
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "repkit fit", "description": _words()},
            args=with_config(args),
            run=False,
        )


def _words() -> str:
    """What the help says first."""
    return (
        "Train heads on frozen features by a recipe: repkit fit RECIPE [--option value ...]. RECIPE is a yaml file, or "
        f"one of repkit's own by its name: {', '.join(recipe_names())}. A killed run goes on. Options of those with a "
        "line `recipe:` (knn, pixels) are in: repkit fit RECIPE --help"
    )


def fit(cli: FitCLI) -> dict[str, Any]:
    """Train, or go on from out/last.ckpt, then score the test split once; returns what out/results.json holds.

    Raises ValueError if out holds a run of another recipe.
    """
    out = Path(cli.config.out)
    out.mkdir(parents=True, exist_ok=True)
    last, beside = out / "last.ckpt", [_LOGS, _BOARD, "last.ckpt.tmp"]
    if all(found.name in (SETTINGS, *beside) for found in out.iterdir()):  # whatever was begun here kept nothing
        (out / SETTINGS).unlink(missing_ok=True)
    claim(out, _settings(cli), "a recipe's results", beside=beside)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    try:
        trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None
    found = _found(cli)
    if trainer.is_global_zero:
        _write(out, found, cli)
    return found


def _found(cli: FitCLI) -> dict[str, Any]:
    """The validation scores of every head, and the test scores of the one that they choose."""
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if model.scored_at != trainer.global_step:  # the last steps came after the last validation
        trainer.validate(model, data, verbose=False)
    scores = [
        {"head": name, **{measure: values[place] for measure, values in model.scores.items()}}
        for place, name in enumerate(model.names)
    ]
    found = {"steps": trainer.global_step, "chosen": model.names[model.best], "validation": scores}
    if data.tested:
        (found["test"],) = trainer.test(model, data, verbose=False)
    return found


def _write(out: Path, found: dict[str, Any], cli: FitCLI) -> None:
    """results.json, curve.csv and curve.png."""
    table, results = curve_table(cli.checkpoint.curves), json.dumps(found, indent=1) + "\n"
    publish(out, {"curve.csv": table.encode(), "results.json": results.encode()})
    save(curve_picture(cli.checkpoint.curves, found["chosen"]), out / "curve.png")


def _recipe(args: Sequence[str]) -> str:
    """What kind of recipe a file is: its line `recipe:`."""
    given = with_config(args)
    if not given:
        raise ValueError(f"no recipe; give a yaml file, or one of repkit's own: {', '.join(recipe_names())}")
    if given[:1] != ["--config"] or len(given) < 2:
        return "heads"
    content = yaml.safe_load(Path(given[1]).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{given[1]} is no recipe; give a yaml file with model, data and trainer")
    if isinstance(content.get("model"), str):
        raise ValueError(f"{given[1]} is no recipe of repkit fit; try: repkit pretrain --config {given[1]}")
    name = content.get("recipe", "heads")
    if name not in ("heads", *OTHERS):
        raise ValueError(f"{given[1]} is a recipe of {name!r}; have heads, {', '.join(OTHERS)}")
    return name


def _settings(cli: FitCLI) -> dict[str, Any]:
    """What a resume may not change: a step would mean something else. How long to train it may."""
    settings = cli.config.as_dict()
    kept = {name: settings[name] for name in ("model", "data")}
    for name in ("epochs", "validate_every", "workers"):
        kept["data"]["init_args"].pop(name, None)
    return kept | {"precision": settings["trainer"]["precision"]}


def main(args: Sequence[str]) -> None:
    """`repkit fit`: parse, train or go on, test; prints what was found."""
    quiet()
    if (other := OTHERS.get(_recipe(args))) is not None:
        print(other(args))
        return
    cli = parse(args)
    found = fit(cli)
    if not cli.trainer.is_global_zero:
        return
    print(f"{found['steps']} steps; best on validation: {found['chosen']}")
    scores = next(one for one in found["validation"] if one["head"] == found["chosen"])
    for name, value in {f"val_{key}": value for key, value in scores.items() if key != "head"}.items():
        print(f"{name:20} {value:.4f}")
    for name, value in found.get("test", {}).items():
        print(f"{name:20} {value:.4f}")
    print(f"results and curve: {cli.config.out}")
