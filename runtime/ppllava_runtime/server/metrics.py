"""What a server counts, for Prometheus to fetch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ppllava_runtime.answer import Accounting

CONTENT_TYPE = CONTENT_TYPE_LATEST

# From one step of a small decoder to a long video on a small machine.
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)
_STAGES = ("decode", "preprocess", "vision", "text", "pool", "prefill", "generate")
Fate = Literal["received", "dropped", "encoded"]


class Metrics:
    """What one server counts. Any thread may count.

    Args:
        version: Of this package.
        model: Name of the model.
        device: Where it runs.
    """

    def __init__(self, version: str, model: str, device: str) -> None:
        self._registry = registry = CollectorRegistry()
        build = Gauge(
            "ppllava_build_info", "What runs here.", ["version", "model", "device"],
            registry=registry,
        )  # fmt: skip
        build.labels(version, model, device).set(1)
        self._requests = Counter(
            "ppllava_requests", "Responses by route and status.", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "ppllava_request_seconds", "From a request's head to the end of its response.",
            ["route"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._stage_seconds = Histogram(
            "ppllava_stage_seconds", "Time of an answer by stage.", ["stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._frames = Counter(
            "ppllava_frames", "Frames and pictures by what was done with them.", ["step"],
            registry=registry,
        )  # fmt: skip
        self._visual_tokens = Counter(
            "ppllava_visual_tokens", "Visual tokens before and after pooling.", ["pooling"],
            registry=registry,
        )  # fmt: skip
        self._text_tokens = Counter(
            "ppllava_decoder_tokens", "Tokens of prompts and of answers.", ["part"],
            registry=registry,
        )  # fmt: skip
        self._media = Counter(
            "ppllava_media", "Requests with media by whether they had been watched before.",
            ["cache"], registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "ppllava_media_failures", "Files that broke a limit, or the process that decoded them.",
            registry=registry,
        )  # fmt: skip
        self._live_frames = Counter(
            "ppllava_live_frames", "Frames of live sessions by what became of them.", ["fate"],
            registry=registry,
        )  # fmt: skip
        # Of what is there from the start, so that a first increase is seen as one.
        for stage in _STAGES:
            self._stage_seconds.labels(stage)
        for step in ("decoded", "encoded", "sampled"):
            self._frames.labels(step)
        for pooling in ("before", "after"):
            self._visual_tokens.labels(pooling)
        for part in ("prompt", "answer"):
            self._text_tokens.labels(part)
        for cache in ("hit", "miss"):
            self._media.labels(cache)
        for fate in ("received", "dropped", "encoded"):
            self._live_frames.labels(fate)

    def answered(self, accounting: Accounting) -> None:
        """Counts one answer, whole or cut short."""
        for stage, milliseconds in vars(accounting.milliseconds).items():
            self._stage_seconds.labels(stage).observe(milliseconds / 1000)
        self._frames.labels("decoded").inc(accounting.num_frames_decoded)
        self._frames.labels("encoded").inc(accounting.num_frames_encoded)
        self._frames.labels("sampled").inc(accounting.num_frames_sampled)
        self._visual_tokens.labels("before").inc(accounting.num_tokens_before)
        self._visual_tokens.labels("after").inc(accounting.num_tokens_after)
        self._text_tokens.labels("prompt").inc(accounting.num_prompt_tokens)
        self._text_tokens.labels("answer").inc(accounting.num_new_tokens)

    def watched(self, *, cached: bool) -> None:
        """Counts one request with media."""
        self._media.labels("hit" if cached else "miss").inc()

    def media_failed(self) -> None:
        """Counts one file that broke a limit, or the process that decoded it."""
        self._failures.inc()

    def live_frames(self, fate: Fate, count: int = 1) -> None:
        """Counts frames of a live session."""
        self._live_frames.labels(fate).inc(count)

    def responded(self, route: str, status: int, seconds: float | None = None) -> None:
        """Counts one response, and the time from its request where that has been taken."""
        self._requests.labels(route, str(status)).inc()
        if seconds is not None:
            self._request_seconds.labels(route).observe(seconds)

    def show(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(name, what, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
