"""One process owns a live index: a lock on a file that names its owner and goes with the process, however it ends."""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path


def own(path: Path) -> int:
    """Lock the file and write into it who has it; the returned descriptor holds the lock until it is closed.

    Raises BlockingIOError, naming the owner, where another opener has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(handle)
        os.close(handle)
        reason = f"{owner} has this index open; stop it first, or use another copy of the folder"
        raise BlockingIOError(errno.EWOULDBLOCK, reason, str(path.parent)) from None
    except BaseException:
        os.close(handle)
        raise
    _sign(handle)
    return handle


def _sign(handle: int) -> None:
    """Say who has it; on a full disk the lock holds without a name."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    signature = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, signature, 0)
    except OSError:
        pass


def _owner(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (ValueError, LookupError, TypeError):
        return "another process"
