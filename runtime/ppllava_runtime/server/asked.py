"""A request that is well formed → what is to be seen, what was said before, and what is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from ppllava_runtime.asking import DEFAULT_MAX_NEW_TOKENS, Options
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.schema import (
    AssistantMessage,
    ChatCompletionRequest,
    FramesPart,
    ImageUrl,
    ImageUrlPart,
    InputVideo,
    JsonSchemaFormat,
    MediaPart,
    ProcessorOptions,
    SystemMessage,
    TextPart,
    UserMessage,
    VideoOptions,
    VideoUrl,
    VideoUrlPart,
)
from ppllava_runtime.window import Axes

Relevance = Literal["curve", "heatmaps"]
Number = TypeVar("Number", int, float)

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Item:
    """Something to be seen.

    Attributes:
        kind: A video, a video as the pictures of its frames, or a picture.
        urls: Where it is: one URL, or one per frame; None where it is only named.
        uuid: Its name, by which it may be known.
        param: Its place in the request.
        fps: Of a video, frames to look at per second of it; of frames, how many are a second.
        num_frames: The most frames to look at.
    """

    kind: Literal["video", "frames", "image"]
    urls: tuple[str, ...] | None
    uuid: str | None
    param: str
    fps: float | None = None
    num_frames: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request as the assistant takes it.

    Attributes:
        items: What is to be seen: nothing, one video or some pictures.
        preface: Of the system.
        turns: Questions and answers before.
        question: The last question.
        options: How it is asked.
        relevance: What to tell of where the model looked.
    """

    items: tuple[Item, ...]
    preface: str
    turns: tuple[tuple[str, str], ...]
    question: str
    options: Options
    relevance: Relevance | None


def read_asked(request: ChatCompletionRequest) -> Asked:
    """What a request asks for.

    Raises:
        ApiError: 400: fields or messages that have no meaning together.
        UsageError: See `Options`.
    """
    first = next((i for i, m in enumerate(request.messages) if m.role not in _SYSTEM), None)
    if first is None:
        _refuse("messages", "there is no question: end with a message of the user")
    preface = [m for m in request.messages[:first] if isinstance(m, SystemMessage)]
    users, assistants = [], []
    for place, message in enumerate(request.messages[first:], first):
        expected = "assistant" if (place - first) % 2 else "user"
        if message.role != expected:
            _refuse(
                f"messages[{place}].role",
                f"it is {message.role!r}, expected {expected!r}: the system comes first, then the "
                "user and the assistant take turns",
            )
        if isinstance(message, UserMessage):
            users.append((place, message))
        elif isinstance(message, AssistantMessage):
            assistants.append(_text(message.content))
    if len(users) == len(assistants):
        _refuse("messages", "the last one is the assistant's: end with a message of the user")
    for place, message in users[1:]:
        for where, _ in _media(place, message):
            _refuse(where, "it is to be seen, but not in the first message of the user: move it")
    items = _items(list(_media(*users[0])), request)
    relevance = request.x_ppllava.relevance if request.x_ppllava else None
    if relevance is not None and not items:
        _refuse("x_ppllava.relevance", "there is nothing to be seen: leave it out")
    questions = [_text(message.content) for _, message in users]
    return Asked(
        items,
        "\n\n".join(text for m in preface if (text := _text(m.content).strip())),
        tuple(zip(questions, assistants, strict=False)),
        questions[-1],
        options_of(request, bool(items)),
        relevance,
    )


def _text(content: str | Sequence[TextPart | MediaPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _media(place: int, message: UserMessage) -> Iterator[tuple[str, MediaPart]]:
    """Yields the parts of a message that are to be seen, with their places in the request."""
    if not isinstance(message.content, str):
        for i, part in enumerate(message.content):
            if not isinstance(part, TextPart):
                yield f"messages[{place}].content[{i}]", part


def _items(
    parts: Sequence[tuple[str, MediaPart]], request: ChatCompletionRequest
) -> tuple[Item, ...]:
    options = request.media_io_kwargs.video if request.media_io_kwargs else None
    items = tuple(_item(param, part, options or VideoOptions()) for param, part in parts)
    videos = [item for item in items if item.kind != "image"]
    if videos and len(items) > 1:
        _refuse(items[1].param, "expected one video alone, or pictures without a video")
    if options is not None and not videos and (options.fps or options.num_frames):
        _refuse("media_io_kwargs.video", "there is no video that it could be about: leave it out")
    named = [item for item in items if item.urls is None]
    for item in named:
        if item.uuid is None:
            _refuse(item.param, "it has neither content nor a uuid: give one of them")
    if named and len(named) < len(items):
        _refuse(
            named[0].param,
            "pictures are remembered together, and others come with content: send all or none",
        )
    return items


def _item(param: str, part: MediaPart, options: VideoOptions) -> Item:
    if isinstance(part, ImageUrlPart):
        image = part.image_url or ImageUrl()
        urls = None if image.url is None else (image.url,)
        return Item("image", urls, _uuid(param, part.uuid, image.uuid), param)
    if isinstance(part, FramesPart):
        frames = tuple(part.frames) if part.frames is not None else None
        if options.fps is not None:
            _refuse("media_io_kwargs.video.fps", "frames are given one by one: use num_frames")
        num_frames = _first(part.num_frames, options.num_frames)
        return Item("frames", frames, part.uuid, param, part.fps, num_frames)
    given = part.video_url if isinstance(part, VideoUrlPart) else part.input_video
    inside = given or VideoUrl()
    url = _url(inside)
    return Item(
        "video",
        None if url is None else (url,),
        _uuid(param, part.uuid, inside.uuid),
        param,
        _first(inside.fps, part.fps, options.fps),
        _first(inside.num_frames, part.num_frames, options.num_frames),
    )


def _url(video: VideoUrl | InputVideo) -> str | None:
    if isinstance(video, VideoUrl) or video.data is None:
        return video.url if isinstance(video, VideoUrl) else None
    # Some clients send a whole URL here.
    return video.data if video.data.startswith("data:") else f"data:;base64,{video.data}"


def _uuid(param: str, beside: str | None, inside: str | None) -> str | None:
    if beside and inside and beside != inside:
        _refuse(f"{param}.uuid", "there is another one inside: give one of them")
    return inside or beside


def _first(*values: Number | None) -> Number | None:
    return next((value for value in values if value is not None), None)


def options_of(request: ChatCompletionRequest, sees: bool) -> Options:
    """How a request asks its question.

    Args:
        request: Whose fields say so.
        sees: Whether there is anything to be seen.

    Raises:
        ApiError: 400: fields that have no meaning together.
        UsageError: See `Options`.
    """
    given = (request.max_tokens, request.max_completion_tokens)
    lengths = {length for length in given if length is not None}
    if len(lengths) > 1:
        _refuse("max_tokens", "max_completion_tokens is another: give one of them")
    pooling = request.mm_processor_kwargs or ProcessorOptions()
    if not sees and any(vars(pooling).values()):
        _refuse("mm_processor_kwargs", "there is nothing to be seen: leave it out")
    if request.stream_options is not None and not request.stream:
        _refuse("stream_options", "the answer is not streamed: leave it out, or set stream")
    asked_format = request.response_format
    schema = None
    if isinstance(asked_format, JsonSchemaFormat):
        schema = asked_format.json_schema.schema_
    return Options(
        num_tokens=pooling.num_tokens,
        kernel=_axes(pooling.kernel),
        stride=_axes(pooling.stride),
        max_new_tokens=lengths.pop() if lengths else DEFAULT_MAX_NEW_TOKENS,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=_stops(request.stop),
        json_schema=schema,
    )


def _stops(stop: str | list[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _axes(axes: list[int] | None) -> Axes | None:
    if axes is None:
        return None
    t, h, w = axes
    return (t, h, w)


def _refuse(param: str, why: str) -> NoReturn:
    raise ApiError(400, f"request: {param}: {why}", code="invalid_value", param=param)
