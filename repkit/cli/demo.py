"""The whole tour on the bundled models."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("demo"),
) -> None:
    """Run the whole tour and write OUT/index.html.

    On the bundled models and images; features that are there from an earlier run are kept.
    """
    from repkit.tasks.demo import run_demo

    print(run_demo(out))
