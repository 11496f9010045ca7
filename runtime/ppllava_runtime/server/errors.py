"""What a client is told of a failure: a status, and OpenAI's body of one sentence."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    MediaError,
    NotFoundError,
    PPLLaVAError,
    SandboxError,
    UnavailableError,
    UsageError,
)

_LOGGER = logging.getLogger("ppllava.server")

# What a request can bring about by what it asks for; any other failure is the server's.
_CODES: tuple[tuple[type[PPLLaVAError], str], ...] = (
    (UsageError, "invalid_value"),
    (MediaError, "media_refused"),
    (DataError, "invalid_media"),
    (NotFoundError, "not_found"),
    (IncompatibleError, "unsupported"),
    (UnavailableError, "unsupported"),
)
_DETAILS_STAY_HERE = "the server failed to answer; its log says why"
_NOT_THE_MEDIA = "the server cannot decode media at this moment; its log says why: send it again"
_RETRY_SECONDS = 1.0  # by then another process decodes


class ApiError(Exception):
    """A failure as a client sees it.

    Args:
        status: Of the response.
        message: One sentence, as all errors of this project.
        code: For programs, e.g. "media_too_large".
        param: The place in the request, e.g. "messages[0].content[1]".
        type: OpenAI's family of errors.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        type: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type
        self.retry_after = retry_after

    @staticmethod
    def of(error: BaseException) -> ApiError:
        """What a client may know of any failure: what it asked wrong, but nothing from inside.

        A failure of the server's own is logged here, with its traceback.
        """
        if isinstance(error, ApiError):
            return error
        if isinstance(error, SandboxError):
            _LOGGER.error("media cannot be decoded", exc_info=error)
            return ApiError(
                503,
                _NOT_THE_MEDIA,
                code="decoder_unavailable",
                type="server_error",
                retry_after=_RETRY_SECONDS,
            )
        for kind, code in _CODES:
            if isinstance(error, kind):
                return ApiError(400, str(error), code=code)
        _LOGGER.error("a request failed", exc_info=error)
        return ApiError(500, _DETAILS_STAY_HERE, code="internal_error", type="server_error")

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}, as OpenAI has it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What the response says beside its body."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after)))}

    def response(self) -> Response:
        """The whole response."""
        # A message may name what a client sent, and that may be half of a surrogate pair.
        text = json.dumps(self.body)
        return Response(text, self.status, self.headers, media_type="application/json")


async def error_response(_: Request, error: Exception) -> Response:
    """The response to any exception: a handler of Starlette's."""
    return ApiError.of(error).response()
