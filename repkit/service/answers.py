"""Answers: JSON that no value breaks, and errors as a code and one line, without a trace of the code behind."""

import errno
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as Raised
from starlette.responses import JSONResponse, Response

_log = logging.getLogger("repkit")
_CODES = {
    400: "bad_request",
    401: "no_key",
    403: "forbidden",
    404: "not_found",
    405: "no_such_method",
    408: "too_slow",
    409: "conflict",
    411: "bad_request",
    413: "too_large",
    415: "wrong_type",
    422: "invalid",
    429: "busy",
    503: "unavailable",
    504: "deadline",
    507: "cannot_store",
}


_BRANCH = re.compile(r"constrained-\w+|bool|float|(list|dict)\[.*")  # of the kinds of value that a place may have


class Json(JSONResponse):
    """JSON in ASCII: no text can fail to be sent; numbers that JSON lacks become null."""

    def render(self, content: Any) -> bytes:
        """The bytes of a body."""
        try:
            return _dumped(content)
        except ValueError:
            return _dumped(_plain(content))


def _dumped(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def code_of(status: int) -> str:
    """The constant word that stands for a status, where nothing says it more closely."""
    return _CODES.get(status, "internal" if status >= 500 else "bad_request")


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> HTTPException:
    """What a route raises; the code is that of the status unless another is given."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    if status == 429 or (status == 503 and code != "no_model"):  # a model does not come by waiting
        told.setdefault("Retry-After", "1")
    return HTTPException(status, {"code": code or code_of(status), "message": message}, told)


def refused(error: HTTPException) -> Response:
    """The response for what `refusal` made."""
    return Json({"error": error.detail}, error.status_code, error.headers)


def failure(error: BaseException) -> HTTPException:
    """How an exception of the library is told: a mistake of the client, no space, or a fault of ours."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, TimeoutError):
        return refusal(504, "the request's time is over; a change may have been made: repeat it with the same key")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG):
        return refusal(507, f"the change could not be stored ({error.strerror}); searches go on")
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        return refusal(503, "the index is closed; the service is ending, or its log says why")
    if type(error) is ValueError:  # those of Arrow, of JSON and of text are faults of ours
        return refusal(422, next(iter(str(error).splitlines()), "not valid"))
    _log.error("a request failed", exc_info=error)
    return HTTPException(500, {"code": "internal", "message": "a fault of the service; its log says more"})


def add_handlers(app: FastAPI) -> None:
    """Tell every error in the one form."""
    for kind in (ValueError, OSError, Exception):
        app.add_exception_handler(kind, _on_failure)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Raised, _on_raised)


async def _on_failure(_: Request, error: Exception) -> Response:
    return refused(failure(error))


async def _on_invalid(_: Request, error: Exception) -> Response:
    """Where the request is wrong and how, without what was sent."""
    assert isinstance(error, RequestValidationError)
    return refused(refusal(422, "; ".join(problems(error.errors())[:5])[:2000]))


def problems(errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """What pydantic found, a line a place: of a value that may be of several kinds it tells why it is none of them."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for one in errors:
        parts = takewhile(lambda part: not _BRANCH.fullmatch(part), map(str, one["loc"]))
        places.setdefault(".".join(part[:80] for part in parts), []).append(one)
    return [f"{place}: {_problem(found)}" for place, found in places.items()]


def _problem(found: list[Mapping[str, Any]]) -> str:
    if len(found) == 1:
        return found[0]["msg"]
    nearly = [one["msg"] for one in found if not one["type"].endswith("_type")]  # of the right kind, and yet not right
    lists = any("list[" in str(part) for one in found for part in one["loc"])
    return nearly[0] if nearly else f"give text, a number, true or false{', a list or operators with these' * lists}"


async def _on_raised(_: Request, error: Exception) -> Response:
    assert isinstance(error, Raised)
    if isinstance(error.detail, dict):
        return Json({"error": error.detail}, error.status_code, error.headers)
    message = str(error.detail)[:500]
    return Json(
        {"error": {"code": code_of(error.status_code), "message": message}},
        error.status_code,
        error.headers,
    )
