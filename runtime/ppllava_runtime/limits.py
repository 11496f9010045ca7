"""What media from strangers may cost, at most: checked before anything of that size is allocated."""

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
        wall_seconds: Time to decode one file, waiting included.
        cpu_seconds: Processor time to decode one file.
        address_space: Bytes of memory that the process that decodes may map.
    """

    num_bytes: int = 256 << 20
    num_pixels: int = 4096 * 2304
    num_frames: int = 500_000
    seconds: float = 4 * 3600.0
    wall_seconds: float = 60.0
    cpu_seconds: float = 60.0
    address_space: int = 512 << 20
