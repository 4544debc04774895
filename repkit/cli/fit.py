"""Training heads by a recipe."""

import typer


def fit(context: typer.Context) -> None:
    """Train heads by a recipe, a yaml file."""
    from repkit.recipes.fit import main as train

    train(context.args)
