"""What an answer looks like from outside: OpenAI's shapes, and what this server tells beside."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ppllava_runtime.answer import Accounting, Answer, Milliseconds
from ppllava_runtime.server.asked import Relevance


class _Told(BaseModel):
    """What the server says: always all of it, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Usage(_Told):
    """Tokens of the prompt, the pooled ones of what was seen included, and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @staticmethod
    def of(accounting: Accounting) -> Usage:
        """What an answer's accounting says."""
        prompt, new = accounting.num_prompt_tokens, accounting.num_new_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class Seen(_Told):
    """Something that was seen."""

    kind: Annotated[
        Literal["video", "image"],
        Field(description="What it is: a video's URL may have led to a picture."),
    ]
    uuid: Annotated[str | None, Field(description="As it was given.")]
    sha256: Annotated[
        str,
        Field(
            description="Of the file; of frames, of their hashes in hexadecimal, one after the "
            "other."
        ),
    ]
    timestamps: Annotated[
        list[float],
        Field(description="Seconds of the frames that were looked at; none of a picture."),
    ]
    damage: Annotated[str | None, Field(description="What of the file could not be read.")]


class Frames(_Told):
    """How many frames or pictures the answer looks at, and what was done for that."""

    decoded: int
    sampled: int
    encoded: Annotated[int, Field(description="Run through the vision tower; of a picture, views.")]


class Tokens(_Told):
    """Visual tokens before pooling, and in the prompt."""

    before: int
    after: int


class Spent(_Told):
    """Milliseconds per stage, waiting for others on the device included."""

    decode: float
    preprocess: float
    vision: float
    text: float
    pool: float
    prefill: float
    generate: float
    first_token: Annotated[float, Field(description="All but generate.")]
    total: float

    @staticmethod
    def of(milliseconds: Milliseconds) -> Spent:
        """What was measured."""
        sums = {"first_token": milliseconds.first_token, "total": milliseconds.total}
        spent = vars(milliseconds) | sums
        return Spent(**{name: round(value, 3) for name, value in spent.items()})


class Map(_Told):
    """Where the question made the model look, per frame or picture."""

    curve: Annotated[list[float], Field(description="Mean relevance, in [-1,1].")]
    timestamps: Annotated[list[float], Field(description="Seconds; 0 of pictures.")]
    heatmaps: Annotated[
        list[str] | None,
        Field(description="A PNG with transparency each, as data: URL, to be stretched over it."),
    ]

    @staticmethod
    def of(answer: Answer, asked: Relevance | None) -> Map | None:
        """What was asked for of an answer's relevance; None where it saw nothing."""
        if asked is None or answer.kind is None:
            return None
        drawn = answer.overlays() if asked == "heatmaps" else None
        times = answer.timestamps if answer.kind == "video" else [0.0] * len(answer.thumbnails)
        return Map(
            curve=answer.curve(),
            timestamps=[float(second) for second in times],
            heatmaps=None if drawn is None else [_data_url(png) for png in drawn],
        )


class Extra(_Told):
    """What the answer is based on and what it cost."""

    media: list[Seen]
    cached: Annotated[bool, Field(description="Whether nothing had to be watched for this answer.")]
    frames: Frames
    tokens: Tokens
    milliseconds: Spent
    relevance: Map | None

    @staticmethod
    def of(answer: Answer, media: Sequence[Seen], asked: Relevance | None) -> Extra:
        """What there is to tell of an answer that is complete."""
        accounting = answer.accounting
        encoded = accounting.num_frames_encoded
        return Extra(
            media=list(media),
            cached=answer.kind is not None and encoded == 0,
            frames=Frames(
                decoded=accounting.num_frames_decoded,
                sampled=accounting.num_frames_sampled,
                encoded=encoded,
            ),
            tokens=Tokens(before=accounting.num_tokens_before, after=accounting.num_tokens_after),
            milliseconds=Spent.of(accounting.milliseconds),
            relevance=Map.of(answer, asked),
        )


FinishReason = Literal["stop", "length"]


class AnswerMessage(_Told):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Choice(_Told):
    """The one answer there is."""

    index: Literal[0]
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None


class ChatCompletion(_Told):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage
    x_ppllava: Extra


class Delta(_Told):
    """What is new: the role in the first chunk, then text, nothing in the last."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Told):
    """A piece of the one answer there is."""

    index: Literal[0]
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: None


class ChatCompletionChunk(_Told):
    """A piece of an answer, the data of one event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: Annotated[list[ChunkChoice], Field(max_length=1)]
    usage: Annotated[
        Usage | None, Field(description="In a last chunk without choices, where asked for.")
    ] = None
    x_ppllava: Annotated[
        Extra | None, Field(description="In the chunk that has the finish_reason.")
    ] = None


class Failure(_Told):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Told):
    """What a request gets that failed."""

    error: Failure


class ModelCard(_Told):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Told):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(_Told):
    """The server is there; or, of /health/ready, it answers."""

    status: Literal["ok", "ready"]


def event_of(fields: dict[str, Any] | str) -> bytes:
    """An event of a stream: JSON, or a word as it is."""
    data = fields if isinstance(fields, str) else json.dumps(fields, allow_nan=False)
    return f"data: {data}\n\n".encode("ascii")


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
