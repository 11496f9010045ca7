"""What a client may say in a live session, message by message; all else is an error."""

from __future__ import annotations

import base64
import binascii
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError
from ppllava_runtime.asking import Options
from ppllava_runtime.server.answering import aside
from ppllava_runtime.server.asked import Relevance, options_of
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.schema import num_values, read_request

# Far more than a question with its options has, and little to read while others wait.
_MOST_VALUES = 10_000
# Of a request for a completion, what has a meaning beside a question.
_OF_QUERY = (
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "response_format",
    "mm_processor_kwargs",
    "x_ppllava",
)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class Config(_Message):
    """The first message: how the session shall be.

    Attributes:
        model: The one that is served.
        modalities: Text is what there is.
        system_prompt: What the model is told before each question.
        seconds: What the window spans.
        fps: Frames a second that are kept.
    """

    type: Literal["session.config"]
    model: str | None = None
    modalities: list[Literal["text"]] | None = None
    system_prompt: Annotated[str, Field(max_length=100_000)] = ""
    seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None


class SentFrame(_Message):
    """A frame.

    Attributes:
        data: A picture in base64.
        timestamp: When it was to be seen, in seconds; later than that of the frame before. Without
            it that is when it came.
    """

    type: Literal["video.frame"]
    data: str
    timestamp: Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)] | None = None

    def picture(self) -> bytes:
        """The picture's file.

        Raises:
            ApiError: Not base64.
        """
        try:
            return self._decoded
        except (binascii.Error, ValueError) as error:
            raise _refusal("video.frame.data", f"it is not base64: {error}") from error

    @cached_property
    def _decoded(self) -> bytes:
        return base64.b64decode(self.data, validate=True)


class Done(_Message):
    """The last message: what was asked is answered, then the session ends."""

    type: Literal["video.done"]


class Cancel(_Message):
    """The answers that were asked for are not wanted any more."""

    type: Literal["response.cancel"]


@dataclass(frozen=True)
class Query:
    """A question about the window as it is when all frames before it were looked at.

    Attributes:
        text: In one's own words.
        id: What its events are to carry, None is nothing.
        options: How it is asked.
        relevance: What to tell of where the model looked.
    """

    text: str
    id: str | None
    options: Options
    relevance: Relevance | None


_OTHERS: TypeAdapter[Config | SentFrame | Done | Cancel] = TypeAdapter(
    Annotated[Config | SentFrame | Done | Cancel, Field(discriminator="type")]
)
_ID: TypeAdapter[str | None] = TypeAdapter(Annotated[str, Field(max_length=256)] | None)


async def read_aside(text: str, model_id: str) -> Config | SentFrame | Query | Done | Cancel:
    """The same as `read_message`, while the event loop goes on."""
    return await aside(len(text), lambda: _read(text, model_id))


def _read(text: str, model_id: str) -> Config | SentFrame | Query | Done | Cancel:
    message = read_message(text, model_id)
    if isinstance(message, SentFrame):
        with suppress(ApiError):  # which is told to who asks for it
            message.picture()
    return message


def read_message(text: str, model_id: str) -> Config | SentFrame | Query | Done | Cancel:
    """The message in a text.

    Args:
        text: As it came.
        model_id: The model that is served.

    Raises:
        ApiError: Not of JSON, of no known type, or not what such a message may be.
        UsageError: See `Options`.
    """
    if num_values(text.encode(errors="replace")) > _MOST_VALUES:
        raise ApiError(
            400,
            f"message: it has more than {_MOST_VALUES} commas, colons and brackets: send less",
            code="invalid_json",
        )
    try:
        value = strict_json.loads(text, "message")
    except DataError as error:
        raise ApiError(400, str(error), code="invalid_json") from error
    if not isinstance(value, dict):
        raise _refusal("message", "expected an object with a type")
    if value.get("type") == "video.query":
        return _query(value, model_id)
    try:
        message = _OTHERS.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "union_tag_invalid" or first["type"] == "union_tag_not_found":
            raise _refusal(
                "type",
                "expected session.config, video.frame, video.query, video.done or response.cancel",
            ) from None
        place = ".".join(strict_json.shortened(str(step)) for step in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(
                400, f"message: unknown field {place}: leave it out", code="unknown_field"
            ) from None
        raise _refusal(place, first["msg"].replace("Input should be", "expected", 1)) from None
    if isinstance(message, Config) and message.model not in (None, model_id):
        raise ApiError(
            404, f"message: session.config.model: expected {model_id!r}", code="model_not_found"
        )
    return message


def _query(value: dict[str, Any], model_id: str) -> Query:
    """A question, which is a request for a completion of one message in other words."""
    given = {key: field for key, field in value.items() if key not in ("type", "text", "id")}
    for field in given:
        if field not in _OF_QUERY:
            place = strict_json.shortened(f"video.query.{field}")
            raise ApiError(
                400, f"message: unknown field {place}: leave it out", code="unknown_field"
            )
    text = value.get("text")
    if not isinstance(text, str):
        raise _refusal("video.query.text", "expected the question")
    try:
        name = _ID.validate_python(value.get("id"), strict=True)
    except ValidationError:  # half of a surrogate pair is no character either
        raise _refusal("video.query.id", "expected up to 256 characters") from None
    messages = [{"role": "user", "content": text}]
    body = json.dumps({"model": model_id, "messages": messages, **given}).encode()
    request = read_request(body, "application/json")
    relevance = request.x_ppllava.relevance if request.x_ppllava else None
    return Query(text, name, options_of(request, True), relevance)


def _refusal(place: str, why: str) -> ApiError:
    return ApiError(400, f"message: {place}: {why}", code="invalid_value", param=place)
