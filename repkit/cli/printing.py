"""What commands print: one line on stderr, one JSON object on stdout, sizes in decimal units."""

import json
import sys
from typing import Any


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value))


def in_bytes(count: int) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(max(len(str(count)) - 1, 0) // 3, len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"
