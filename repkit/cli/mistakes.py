"""Exit codes, and what a user's mistake is in one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

OK, USAGE, SOME_FAILED, NONE_SUCCEEDED, CANNOT_WRITE, INTERRUPTED = 0, 2, 3, 4, 5, 130
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS} | _FULL | _IN_THE_WAY
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # newer typers hold a click of their own


def exit_code(error: Exception) -> int:
    """What the command ends with after an error that a user can do something about."""
    return CANNOT_WRITE if isinstance(error, OSError) and error.errno in _WRITE_ERRORS else USAGE


def explain(error: Exception) -> str | None:
    """One line about what a user can do something about; None for what is our own mistake."""
    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        return f"{error.format_message().rstrip('.')} (see {context.command_path if context else 'repkit'} --help)"  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        way = "; that is in the way, choose another place" if error.errno in _IN_THE_WAY else ""
        if error.errno in _FULL and ";" not in error.strerror:
            way = "; make room, or choose another place"
        return f"{error.filename}: {error.strerror}{way}"
    # torch tells of too little memory in RuntimeErrors of several kinds.
    memory = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
    if memory or isinstance(error, MemoryError):
        return "not enough memory; a smaller --batch-size or --size, or pooling, would help"
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


@contextmanager
def blaming(option: str, value: str | None) -> Iterator[None]:
    """Let a ValueError that comes from the value of an option name the option."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}" if value is not None else str(error)) from error
