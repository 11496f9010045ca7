"""What a server is started with."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ppllava_runtime.limits import MediaLimits

_SPOOL_BYTES = 2 << 30
# Several of the largest at once, but not as many as there are connections.
_BODIES_TOGETHER = 4


def _default_spool() -> Path:
    return Path(tempfile.gettempdir()) / f"ppllava-serve-{os.geteuid()}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is started with; the command line gives each.

    Attributes:
        api_keys: Who may ask, each a tenant that shares no memory with others; none is everybody,
            for which the server must listen on the loopback only.
        media_domains: Hosts from which media may be fetched, all of whose addresses must be public;
            "example.com" is it and nothing below it, "*.example.com" what is below.
        private_hosts: Hosts that may have private addresses: "host" or "host:port".
        media_roots: Folders from which file:// URLs may be read.
        num_running: Requests that are answered at once.
        num_queued: Requests that wait for that; others are refused with 429.
        num_live: Live sessions at once.
        live_seconds: Window of a live session.
        live_fps: Frames a second that a live session keeps.
        cache_bytes: Memories of videos kept for the next question.
        body_bytes: Size of a request.
        head_seconds: From a connection's first byte, or its opening, to the end of its headers.
        body_seconds: From there to the end of the body.
        request_seconds: From the first byte to the end of the answer.
        num_connections: Open at once; one more is told so and closed.
        drain_seconds: How long a server that was told to stop goes on with what it accepted.
        spool: Folder for the media of requests that are being answered.
        media: What one file of media may cost.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    media_domains: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    media_roots: tuple[Path, ...] = ()
    num_running: int = 4
    num_queued: int = 16
    num_live: int = 2
    live_seconds: float = 10.0
    live_fps: float = 2.0
    cache_bytes: int = 1 << 30
    body_bytes: int = 64 << 20
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    request_seconds: float = 300.0
    drain_seconds: float = 60.0
    num_connections: int = 512
    spool: Path = field(default_factory=_default_spool)
    media: MediaLimits = field(default_factory=MediaLimits)

    @property
    def bodies_bytes(self) -> int:
        """The most of all bodies of requests that are in memory."""
        return _BODIES_TOGETHER * self.body_bytes

    @property
    def spool_bytes(self) -> int:
        """The most of all files in `spool`: each running request may have one of the largest."""
        return max(_SPOOL_BYTES, self.num_running * self.media.num_bytes)
