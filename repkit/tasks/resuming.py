"""Results that grow in a folder: what they depend on is written beside them, and decides whether a run may go on."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from repkit.features import identity_differences
from repkit.publishing import publish

SETTINGS = "settings.json"
TOLD = 4  # differences


def claim(folder: Path, settings: dict[str, Any], what: str, *, beside: Collection[str] = ()) -> None:
    """Write what the results, called `what`, depend on, or compare with what was written.

    beside: names that may be there before. Settings that are alone, since nothing came of them, are replaced.
    Raises ValueError, naming the differences, for a folder of other settings, and for one with other files.
    """
    path = folder / SETTINGS
    if not path.exists() or _alone(path):
        if any(found.name not in (SETTINGS, f"{SETTINGS}.part", *beside) for found in folder.iterdir()):
            raise ValueError(
                f"{folder} has files that are no {what.removeprefix('a ')}; choose an empty or a new folder"
            )
        publish(folder, {SETTINGS: (json.dumps(settings, indent=1) + "\n").encode()})
    elif differences := identity_differences(json.loads(json.dumps(settings)), json.loads(path.read_text())):
        if len(differences) > TOLD + 1:
            differences = [*differences[:TOLD], f"and {len(differences) - TOLD} more"]
        raise ValueError(f"{folder} has {what} of something else; choose another folder ({'; '.join(differences)})")


def _alone(path: Path) -> bool:
    """Whether it is the only file in its folder and below."""
    own = path, path.with_name(f"{SETTINGS}.part")
    return not any(found.is_file() and found not in own for found in path.parent.rglob("*"))
