"""The command line. Every command imports what it needs when it runs, so that `repkit --help` answers at once."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from repkit.cli.commands import app
from repkit.cli.mistakes import INTERRUPTED, OK, exit_code, explain
from repkit.cli.printing import say


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; a user's mistake is one line on stderr and an exit code, never a traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(given or ["--help"], prog_name="repkit", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("REPKIT_TRACEBACK"):
            raise
        say(f"repkit: {line}")
        sys.exit(exit_code(error))
    if code == INTERRUPTED:
        say("repkit: interrupted; the same command again goes on, or starts over where nothing was kept")
    sys.exit(code or OK)
