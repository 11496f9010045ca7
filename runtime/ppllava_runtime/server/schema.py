"""What a request for a chat completion may say, field by field; all else is an error.

What one field means beside another is read in `asked`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from pydantic_core import ErrorDetails

from ppllava_engines.errors import DataError
from ppllava_engines.strict_json import loads, shortened
from ppllava_runtime.asking import DEFAULT_MAX_NEW_TOKENS
from ppllava_runtime.server.errors import ApiError

# Each comma, colon and bracket makes at most one Python object, of some 60 bytes: so a body of
# nothing but brackets would take many times its size. Pictures and videos have none of them.
_MOST_VALUES = 200_000
_PIECE = 1 << 20  # bytes
_MOST_FRAMES = 2048
_MOST_INT64 = 2**63 - 1


def _whole(value: object) -> object:
    """JSON knows no integers: 1.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# To come last, as bounds behind it would not be in the document.
_WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(max_length=200_000)]
Uuid = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="A name for this item. A later request with this name and without the content, "
        "or with null in its place, is answered from memory, as long as the server remembers it "
        "for the same key and the same sampling.",
    ),
]
Fps = Annotated[
    float,
    Field(gt=0, le=1000, allow_inf_nan=False, description="Frames to look at per second of video."),
]
NumFrames = Annotated[
    int,
    Field(ge=1, le=100_000, description="Frames to look at; with fps, the most of them."),
    _WHOLE,
]
Axis = Annotated[int, Field(ge=1, le=1_000_000), _WHOLE]
Axes = Annotated[list[Axis], Field(min_length=3, max_length=3)]
Url = Annotated[
    str,
    Field(
        min_length=1,
        description="data:, or http:, https: or file: where the server allows what it names; null "
        "or left out for what was sent before under the same uuid.",
    ),
]


class _Strict(BaseModel):
    """Nothing is converted, and nothing that is not known is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class TextPart(_Strict):
    """Some of the text of a message."""

    type: Literal["text"]
    text: Text


class VideoUrl(_Strict):
    """Where a video is, and how much of it to look at."""

    url: Url | None = None
    fps: Fps | None = None
    num_frames: NumFrames | None = None
    uuid: Uuid | None = None


class VideoUrlPart(_Strict):
    """A video; what stands inside `video_url` precedes what stands beside it."""

    type: Literal["video_url"]
    video_url: VideoUrl | None = None
    fps: Fps | None = None
    num_frames: NumFrames | None = None
    uuid: Uuid | None = None


class InputVideo(_Strict):
    """A video itself, and how much of it to look at."""

    data: Annotated[str, Field(min_length=1, description="The file in base64.")] | None = None
    format: Annotated[
        str | None,
        Field(max_length=64, description="Not needed: the file itself says what it is."),
    ] = None
    fps: Fps | None = None
    num_frames: NumFrames | None = None
    uuid: Uuid | None = None


class InputVideoPart(_Strict):
    """A video; what stands inside `input_video` precedes what stands beside it."""

    type: Literal["input_video"]
    input_video: InputVideo | None = None
    fps: Fps | None = None
    num_frames: NumFrames | None = None
    uuid: Uuid | None = None


class FramesPart(_Strict):
    """A video as the pictures of its frames."""

    type: Literal["video"]
    frames: Annotated[list[Url], Field(min_length=1, max_length=_MOST_FRAMES)] | None = None
    fps: Annotated[
        float,
        Field(
            gt=0,
            le=1000,
            allow_inf_nan=False,
            description="How many of the frames given are one second.",
        ),
    ]
    num_frames: NumFrames | None = None
    uuid: Uuid | None = None


class ImageUrl(_Strict):
    """Where a picture is."""

    url: Url | None = None
    detail: Annotated[
        Literal["auto"] | None, Field(description="The model decides, by its own resolution.")
    ] = None
    uuid: Uuid | None = None


class ImageUrlPart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl | None = None
    uuid: Uuid | None = None


MediaPart = VideoUrlPart | InputVideoPart | FramesPart | ImageUrlPart
Part = Annotated[TextPart | MediaPart, Field(discriminator="type")]


def _form(content: object) -> str:
    return "text" if isinstance(content, str) else "parts"


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]
Stop = Annotated[
    Annotated[StopText, Tag("text")] | Annotated[StopTexts, Tag("parts")], Discriminator(_form)
]


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=256)]
TextContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[TextParts, Tag("parts")], Discriminator(_form)
]
Parts = Annotated[list[Part], Field(min_length=1, max_length=256)]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_form)
]


class SystemMessage(_Strict):
    """What the model is told before all else; it has no influence on where the model looks."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(_Strict):
    """A question; the first one brings what is to be seen."""

    role: Literal["user"]
    content: Content


class AssistantMessage(_Strict):
    """What the model answered."""

    role: Literal["assistant"]
    content: TextContent


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream brings besides the text."""

    include_usage: Annotated[
        bool | None, Field(description="One more chunk, at the end, with the usage.")
    ] = None


class SchemaFormat(_Strict):
    """A JSON schema that the answer follows, always."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Literal[True] | None = None


class TextFormat(_Strict):
    """Free text."""

    type: Literal["text"]


class JsonSchemaFormat(_Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFormat


class ProcessorOptions(_Strict):
    """How much is pooled: a budget, or a window over (frames, rows, columns)."""

    num_tokens: Annotated[
        int | None,
        Field(ge=1, le=1_000_000, description="The most visual tokens in the prompt."),
        _WHOLE,
    ] = None
    kernel: Axes | None = None
    stride: Axes | None = None


class VideoOptions(_Strict):
    """How much of a video to look at, where the video itself does not say it."""

    fps: Fps | None = None
    num_frames: NumFrames | None = None


class MediaOptions(_Strict):
    """How media are read."""

    video: VideoOptions | None = None


class Extras(_Strict):
    """What only this server offers."""

    relevance: Annotated[
        Literal["curve", "heatmaps"] | None,
        Field(description="Where the question made the model look: a number or a PNG per frame."),
    ] = None


class ChatCompletionRequest(_Strict):
    """A question about a video, about pictures or about nothing to be seen."""

    model: Annotated[str, Field(max_length=256, description="As /v1/models names it.")]
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    max_tokens: Annotated[
        int | None,
        Field(
            ge=1, le=_MOST_INT64, description=f"The longest answer; {DEFAULT_MAX_NEW_TOKENS} if not"
        ),
        _WHOLE,
    ] = None
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, le=_MOST_INT64, description="The same by its newer name."), _WHOLE
    ] = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=2, allow_inf_nan=False, description="0, the default, is the likeliest."),
    ] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=0, le=_MOST_INT64), _WHOLE] = None
    n: Annotated[int | None, Field(ge=1, le=1), _WHOLE] = None
    response_format: (
        Annotated[TextFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    mm_processor_kwargs: ProcessorOptions | None = None
    media_io_kwargs: MediaOptions | None = None
    x_ppllava: Extras | None = None


def read_request(body: bytes, content_type: str) -> ChatCompletionRequest:
    """The request in a body.

    Raises:
        ApiError: 400: not of JSON, or not what a request may be; names the place.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            400,
            f"request: content-type is {shortened(repr(media_type))}, expected application/json",
            code="invalid_content_type",
        )
    if num_values(body) > _MOST_VALUES:
        raise ApiError(
            400,
            f"request: it has more than {_MOST_VALUES} commas, colons and brackets: send less",
            code="invalid_json",
        )
    try:
        value = loads(body.decode("utf-8"), "request")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"request: not UTF-8: {error.reason}", code="invalid_json") from error
    except DataError as error:
        raise ApiError(400, str(error), code="invalid_json") from error
    try:
        return ChatCompletionRequest.model_validate(value)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False)[0], value) from None


def num_values(body: bytes) -> int:
    """At least how many values JSON has; counted piece by piece, so that other threads go on."""
    return sum(
        body.count(mark, start, start + _PIECE)
        for start in range(0, len(body), _PIECE)
        for mark in (b",", b":", b"[", b"{")
    )


def _refusal(error: ErrorDetails, value: object) -> ApiError:
    param, kind = _place(error, value), error["type"]
    if kind == "extra_forbidden":
        message, code = f"unknown field {param}: leave it out", "unknown_field"
    elif kind == "missing":
        message, code = f"{param} is missing", "missing_field"
    else:
        expected = error["msg"].replace("Input should be", "expected", 1)
        if kind == "model_type":  # which the library calls by a name of its own
            expected = "expected an object"
        message, code = f"{param or 'it'} is {_shown(error['input'])}: {expected}", "invalid_type"
    # Shown back to who sent it, it may be half of a character.
    return ApiError(400, f"request: {message}", code=code, param=param or None)


def _place(error: ErrorDetails, value: object) -> str:
    """Where in the request, as "messages[0].content"; pydantic names the kinds it chose as well."""
    place, here, last = "", value, len(error["loc"]) - 1
    may_be_kind = True
    for depth, step in enumerate(error["loc"]):
        if isinstance(here, list) and isinstance(step, int) and step < len(here):
            place, here, may_be_kind = f"{place}[{step}]", here[step], True
        elif not isinstance(here, dict):
            continue
        elif may_be_kind and step in (here.get("type"), here.get("role")):
            may_be_kind = False  # what comes next are its fields, one of which may have this name
        elif step in here:
            place, here, may_be_kind = f"{place}.{shortened(str(step))}", here[step], True
        elif error["type"] == "missing" and depth == last:
            place = f"{place}.{step}"
    return place.lstrip(".")


def _shown(value: object) -> str:
    if isinstance(value, str):
        return shortened(repr(value[:100]))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and value.bit_length() > 1000:  # whose digits are slow to come by
        return "a very large number"
    if isinstance(value, int | float):
        return shortened(str(value))
    return "an object" if isinstance(value, dict) else "a list"
