"""Errors as the OpenAI API gives them: a status and an object with a message, a type, a parameter and a code."""

from __future__ import annotations

from typing import Any

BAD_REQUEST = "invalid_request_error"
SHOWN_CHARACTERS = 80


class ApiError(Exception):
    """An answer that says what is wrong with a request, or why it cannot be answered now."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = BAD_REQUEST,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Make an error.

        Args:
            message: names the field, its value and what would be right.
            status: of HTTP.
            param: the field of the request.
            code: a word for programs, such as "context_length_exceeded".
            kind: the `type` of the error object.
            headers: further headers of the response.
        """
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def too_busy(message: str, seconds: int) -> ApiError:
    """A queue is full; the client may try again after some seconds."""
    return ApiError(
        message, status=429, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)}
    )


def unavailable(message: str) -> ApiError:
    """The server cannot answer now, whatever the request."""
    return ApiError(message, status=503, kind="server_error", code="unavailable")


def failed(message: str) -> ApiError:
    """The server could not finish an answer that it had begun."""
    return ApiError(message, status=500, kind="server_error", code="engine_error")


def shown(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
