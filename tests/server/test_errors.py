"""What a client learns of a failure, and what it does not."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from starlette.requests import Request

from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    MediaError,
    NotFoundError,
    PPLLaVAError,
    SandboxError,
    StorageError,
    UnavailableError,
    UsageError,
)
from ppllava_runtime.server.errors import ApiError, error_response


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UsageError, "invalid_value"),
        (MediaError, "media_refused"),
        (DataError, "invalid_media"),
        (NotFoundError, "not_found"),
        (IncompatibleError, "unsupported"),
        (UnavailableError, "unsupported"),
    ],
)
def test_what_was_asked_wrong_is_told(kind: type[PPLLaVAError], code: str) -> None:
    error = ApiError.of(kind("video v: it is none"))
    assert (error.status, error.message, error.code) == (400, "video v: it is none", code)


@pytest.mark.parametrize(
    "error",
    [
        StorageError("spool /secret: disk full"),
        InternalError("rows"),
        OSError(28, "x"),
        KeyError("k"),
    ],
)
def test_what_is_the_servers_own_fault_is_told_to_its_log_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "ppllava.server"):
        try:
            raise error
        except Exception as raised:
            told = ApiError.of(raised)
    assert (told.status, told.type, told.code) == (500, "server_error", "internal_error")
    assert "log" in told.message
    assert "secret" not in told.message
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert "raise error" in caplog.text


def test_what_cannot_decode_is_the_servers_own_fault_and_may_be_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = SandboxError("video /secret: the process that decodes it was ended from outside")
    with caplog.at_level(logging.ERROR, "ppllava.server"):
        told = ApiError.of(error)
    assert (told.status, told.type, told.code) == (503, "server_error", "decoder_unavailable")
    assert int(told.headers["retry-after"]) > 0
    assert "secret" not in told.message
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_failure_for_clients_is_told_as_it_is() -> None:
    error = ApiError(404, "gone", code="media_not_found", param="messages[0]")
    assert ApiError.of(error) is error


def test_the_body_is_openais() -> None:
    response = ApiError(400, "é \ud800", code="c", param="p").response()
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert json.loads(bytes(response.body)) == {
        "error": {
            "message": "é \ud800",
            "type": "invalid_request_error",
            "param": "p",
            "code": "c",
        }
    }


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1"), (3.0, "3"), (3.2, "4")])
def test_when_to_try_again_is_whole_seconds(seconds: float, said: str) -> None:
    error = ApiError(429, "busy", code="server_busy", retry_after=seconds)
    assert error.response().headers["retry-after"] == said


def test_without_a_time_to_try_again_none_is_told() -> None:
    assert "retry-after" not in ApiError(400, "no", code=None).response().headers


def test_the_handler_gives_the_response() -> None:
    response = asyncio.run(error_response(Request({"type": "http"}), UsageError("stop is empty")))
    assert (response.status_code, json.loads(bytes(response.body))["error"]["message"]) == (
        400,
        "stop is empty",
    )
