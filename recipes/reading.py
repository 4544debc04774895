"""Reading of recipes without a Trainer: a yaml file and options into the arguments of a function."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

OWN = Path(__file__).parent  # where repkit's own recipes lie, in a checkout and installed


def recipe_names() -> list[str]:
    """The names of repkit's own recipes for `repkit fit`."""
    return sorted(path.stem for path in OWN.glob("*.yaml") if not path.stem.startswith("pretrain"))


def find_recipe(given: str) -> Path:
    """The file of a recipe: at its path, else repkit's own of that name, such as probe or recipes/probe.yaml.

    Raises FileNotFoundError, with the names that there are, for what is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    own = OWN / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path("."), Path("recipes")) and own.is_file():
        return own
    raise FileNotFoundError(f"no recipe {given}; give a yaml file, or one of repkit's own: {', '.join(recipe_names())}")


def with_config(args: Sequence[str]) -> list[str]:
    """`RECIPE --option value` as `--config FILE --option value`."""
    given = list(args)
    if given and not given[0].startswith("-"):
        given.insert(0, "--config")
    if given[:1] in (["-c"], ["--config"]) and len(given) > 1:
        given[:2] = ["--config", str(find_recipe(given[1]))]
    return given


def call(function: Callable[..., Any], args: Sequence[str]) -> Any:
    """Call a function with `[FILE] [--option value ...]`; SystemExit, after a usage message, for what does not fit."""
    return auto_cli(function, args=with_config(args), prog="repkit fit", as_positional=False)
