"""The last version that anybody was told is safe, so that an older database is not taken for the whole truth."""

import logging
import os
import zlib
from pathlib import Path

NAME = "acknowledged"
_log = logging.getLogger("repkit")


def write_acknowledged(handle: int, version: int) -> None:
    """Note a version that is on the disk; no sync is needed, since a kill keeps it and older versions do no harm."""
    text = f"{version:020d}"
    os.pwrite(handle, f"{text} {zlib.crc32(text.encode()):08x}\n".encode(), 0)


def read_acknowledged(path: Path) -> int:
    """The noted version, 0 where there is none that can be read."""
    try:
        text, crc = path.read_text().split()
        if zlib.crc32(text.encode()) == int(crc, 16):
            return int(text)
    except FileNotFoundError:
        return 0
    except ValueError:
        pass
    _log.warning("%s cannot be read; it is not checked whether changes are missing", path)
    return 0
