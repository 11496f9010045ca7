"""What media from strangers may cost at most, checked before anything so large is allocated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """The most that one file of video or pictures may be and take.

    Attributes:
        num_bytes: Size of a file.
        num_pixels: Width × height of a frame or a picture.
        num_frames: Frames of a file, looked at or not.
        seconds: Duration of a file.
        wall_seconds: Time that is waited for what comes from one file, in all; while whoever takes
            it does something else, the clock stands.
        cpu_seconds: Processor time to decode one file.
        address_space: Bytes of memory that the process that decodes may map. Some 220 MB of it are
            Python and FFmpeg before there is a file, of which hardly 60 are memory in use.
    """

    num_bytes: int = 256 << 20
    num_pixels: int = 4096 * 2304
    num_frames: int = 500_000
    seconds: float = 4 * 3600.0
    wall_seconds: float = 60.0
    cpu_seconds: float = 60.0
    address_space: int = 680 << 20
