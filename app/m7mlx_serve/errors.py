"""What goes wrong with a request: told to its client, and to whoever runs the server."""

from __future__ import annotations

import contextlib
import select
import sys
import traceback
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from m7mlx.errors import InputError, PromptTooLongError

_LINE = 400  # characters; a pipe that takes any takes 512


class ApiError(Exception):
    """An error as OpenAI's clients read it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    def response(self, body: dict[str, Any] | None = None) -> JSONResponse:
        """The whole response, with `body` or the one of OpenAI's API."""
        return JSONResponse(self.body() if body is None else body, self.status, self.headers)

    def body(self) -> dict[str, Any]:
        """The JSON object that says what is wrong."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


def refusal(error: InputError) -> ApiError:
    """The ApiError for what the model cannot do.

    That a prompt is too long is told in the words and the code by which agents know that they have
    to shorten their conversation: Claude Code reads both numbers from the message.
    """
    if not isinstance(error, PromptTooLongError):
        return ApiError(400, str(error))
    message = str(error)
    if error.tokens is not None and error.room is not None:
        message = f"prompt is too long: {error.tokens} tokens > {error.room} maximum; shorten it"
    return ApiError(400, message, "context_length_exceeded")


def report(error: BaseException) -> None:
    """Tell whoever runs the server what failed and where, on one line of stderr.

    The error's message is left out: it could quote a conversation. If nobody reads stderr and the
    pipe is full, nothing is written, since waiting would hold up every client.
    """
    places = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
    line = f"m7mlx-serve: a request failed: {type(error).__name__} at {where}"
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [sys.stderr], [], 0)[1]:
            print(line[:_LINE], file=sys.stderr)
