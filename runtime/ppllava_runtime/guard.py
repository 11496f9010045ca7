"""A file from a stranger: read by its descriptor alone, within limits, by decoders that are known.

Nothing here trusts what decodes it: that is what `sandbox` is for, in which all of this runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ppllava_engines.errors import MediaError
from ppllava_runtime.limits import MediaLimits

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# None that opens other files by what is in this one, or that takes a text for pictures.
_DEMUXERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "gif", "apng")
_VIDEO_DECODERS = (
    "h264", "hevc", "av1", "libdav1d", "vp9", "vp8", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg",
    "theora", "gif", "apng", "png", "flv", "h263", "msmpeg4", "prores", "dvvideo", "rawvideo",
)  # fmt: skip
# Nobody listens, but without them FFmpeg looks longer for what it takes to know the rate of frames.
_AUDIO_DECODERS = (
    "aac", "mp3", "mp3float", "mp2", "mp2float", "ac3", "eac3", "opus", "libopus", "vorbis", "flac",
    "alac", "pcm_s16le", "pcm_s16be", "pcm_u8", "pcm_mulaw", "pcm_alaw", "nellymoser", "adpcm_ms",
)  # fmt: skip
_MICROSECONDS = 1_000_000


class Descriptor(RawIOBase):
    """A file that is open, from its beginning, whatever others read by the same descriptor."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__()
        self.name = name
        self._descriptor = descriptor
        self._place = 0
        self._end = os.fstat(descriptor).st_size

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The place from now on, as of any file."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        if origin + offset < 0:
            raise OSError(f"a place before the beginning: {origin + offset}")
        self._place = origin + offset
        return self._place

    def tell(self) -> int:
        """The place."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """How many bytes were put into the buffer; 0 at the end."""
        view = memoryview(buffer).cast("B")[: max(0, self._end - self._place)]
        found = os.preadv(self._descriptor, [view], self._place) if len(view) else 0
        self._place += found
        return found


@dataclass(frozen=True)
class Guard:
    """How a file from a stranger is read.

    Attributes:
        descriptor: By which it is open. Its name is only used to speak of it.
        limits: What it may be.
    """

    descriptor: int
    limits: MediaLimits

    def file(self, path: Path) -> Descriptor:
        """The file, to be read from its beginning."""
        return Descriptor(self.descriptor, path.name)

    def container(self, path: Path) -> InputContainer:
        """The file as FFmpeg reads it, which may open nothing else and use few of its formats.

        Raises:
            av.FFmpegError: Not a video.
            MediaError: One in another format.
        """
        import av

        try:
            return av.open(
                self.file(path),
                "r",
                metadata_errors="replace",
                io_open=_refuse,
                # FFmpeg decodes some frames to find out what a file is. Where it finds the streams
                # only then, nothing but the bound on memory keeps these small.
                options={"max_pixels": str(self._most_pixels)},
                container_options={
                    "format_whitelist": ",".join(_DEMUXERS),
                    "codec_whitelist": ",".join((*_VIDEO_DECODERS, *_AUDIO_DECODERS)),
                    "protocol_whitelist": "",
                    "enable_drefs": "0",
                    "use_absolute_path": "0",
                },
            )
        except av.ArgumentError as error:  # what FFmpeg says to one that is not on the list
            raise MediaError(
                f"video {path}: it is in none of the formats that are read "
                f"({', '.join(_DEMUXERS)}): convert it to mp4"
            ) from error

    def restrain(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        """Lets the stream's decoder refuse what is too large later on.

        Raises:
            MediaError: A stream that is too large now, too long, or of another codec.
        """
        decoder = stream.codec_context
        if decoder.codec.name not in _VIDEO_DECODERS:
            raise MediaError(
                f"video {path}: its codec is {decoder.codec.name}, "
                f"expected one of {', '.join(_VIDEO_DECODERS)}"
            )
        self.check_picture("video", path, decoder.width, decoder.height)
        self.check_count(path, stream.frames)
        lengths = [(container.duration or 0) / _MICROSECONDS]
        lengths += [float((stream.duration or 0) * (stream.time_base or 0))]
        self.check_seconds(path, max(lengths))
        decoder.options = {**decoder.options, "max_pixels": str(self._most_pixels)}

    def check_picture(self, kind: str, path: Path, width: int, height: int) -> None:
        """Raises MediaError where a picture of this size is too large."""
        if width * height > self.limits.num_pixels:
            raise MediaError(
                f"{kind} {path}: it is {width}×{height}, expected at most "
                f"{self.limits.num_pixels} pixels: make it smaller"
            )

    def check_count(self, path: Path, num_frames: int) -> None:
        """Raises MediaError where so many frames are too many."""
        if num_frames > self.limits.num_frames:
            raise MediaError(
                f"video {path}: it has {num_frames} frames or more, expected at most "
                f"{self.limits.num_frames}: cut it"
            )

    def check_seconds(self, path: Path, seconds: float) -> None:
        """Raises MediaError where a video of this duration is too long."""
        if not seconds <= self.limits.seconds:
            raise MediaError(
                f"video {path}: it lasts {seconds:.0f} s, expected at most "
                f"{self.limits.seconds:.0f}: cut it"
            )

    @property
    def _most_pixels(self) -> int:
        # FFmpeg counts what it allocates, whose sides it rounds up.
        return self.limits.num_pixels + self.limits.num_pixels // 8


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """What FFmpeg finds when a file names another."""
    del url, flags, options
    raise PermissionError("a file from a stranger opens no other")
