"""Every command by its name, in the order of the help."""

import os
from typing import Annotated

import typer

from repkit.cli.classify import classify
from repkit.cli.demo import demo
from repkit.cli.evaluate import evaluate
from repkit.cli.extract import extract
from repkit.cli.fit import fit
from repkit.cli.match import match
from repkit.cli.models import blocks, models
from repkit.cli.presets import presets
from repkit.cli.pretrain import pretrain
from repkit.cli.probe import probe
from repkit.cli.propagate import propagate
from repkit.cli.search import index, search
from repkit.cli.segment import segment
from repkit.cli.serve import serve
from repkit.cli.swap import swap
from repkit.cli.sweep import sweep
from repkit.cli.transfer import transfer
from repkit.cli.visualize import visualize

app = typer.Typer(
    name="repkit",
    help="Diffusion models as feature backbones: address an activation, export it, probe it, search with it.",
    epilog="REPKIT_TRACEBACK=1 in the environment shows where in the code an error came from.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers in half the time
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Set up logging; runs before every command."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("repkit: %(message)s"))
    logging.getLogger("repkit").handlers = [handler]
    # Read when these are imported: what fails is told once, by us.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if version:
        import repkit

        print(repkit.__version__)
        raise typer.Exit()


for command in (
    models,
    blocks,
    presets,
    extract,
    probe,
    sweep,
    visualize,
    index,
    search,
    serve,
    classify,
    match,
    swap,
    transfer,
    propagate,
    segment,
    demo,
):
    app.command()(command)
app.add_typer(evaluate, name="evaluate")
# The recipes read their own flags.
_BARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for recipe in (fit, pretrain):
    app.command(context_settings=_BARE)(recipe)
