"""Training a bundled model by its recipe."""

import typer


def pretrain(context: typer.Context) -> None:
    """Train a bundled model by its recipe."""
    from repkit.recipes.pretrain import main as train

    train(context.args)
