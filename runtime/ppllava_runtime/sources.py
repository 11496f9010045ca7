"""Where live pictures come from: a file as if it were live, a network stream, a camera.

A source gives pictures as fast as they come, and none but the wanted ones are made into RGB. That
it stalls, breaks off and comes again is a matter for `feed.Feed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.errors import (
    DataError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ppllava_runtime import decoding
from ppllava_runtime.decoding import Decoded, Left, opened, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_SCHEMES = ("rtsp", "rtsps", "http", "https", "udp")
# What a stream may lead to: a playlist from afar does not open files here.
_PROTOCOLS = "rtsp,rtsps,rtp,srtp,http,https,httpproxy,udp,tcp,tls,crypto"
# By TCP, as pictures of which packets are lost are of no use to anyone. What is read to find out
# what a stream is must be kept: it may hold the only keyframe for long.
_OPTIONS = {
    "rtsp_transport": "tcp",
    "flags": "low_delay",
    "analyzeduration": "2000000",  # microseconds
    "fpsprobesize": "0",  # frames to wait for to learn their rate, which nobody asks for
    "protocol_whitelist": _PROTOCOLS,
}
# Seconds that opening a stream, and each reading from it, may take.
_TIMEOUT = 10.0
_CSI_PIPELINE = (
    "nvarguscamerasrc sensor-id={number} ! video/x-raw(memory:NVMM),width=1280,height=720,"
    "framerate=30/1 ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! "
    "video/x-raw,format=BGR ! appsink drop=true max-buffers=1"
)


class Lost(Exception):
    """A source broke off, or could not be reached; it may be there later."""


@dataclass(frozen=True)
class Shot:
    """One picture of a source.

    Attributes:
        seconds: Since the first, where the source says so; else None.
        picture: Makes it (H,W,3) uint8 RGB, upright; only until the next one is taken.
    """

    seconds: float | None
    picture: Callable[[], NDArray[np.uint8]]


class Source(Protocol):
    """Something that can be opened again and again, and gives pictures until it ends."""

    @property
    def name(self) -> str:
        """What it is called in messages: without passwords."""
        ...

    @property
    def is_recorded(self) -> bool:
        """Whether it ends, and its own times say when pictures are to be seen."""
        ...

    def shots(self, left: Event) -> Generator[Shot, None, None]:
        """Yields its pictures from when it is opened, by the first; closing it closes that.

        Args:
            left: Set by another thread that wants no more of them.

        Raises:
            Lost: It broke off or could not be reached.
            PPLLaVAError: It will never be there: a missing package, a file that is no video.
        """
        ...


def open_source(text: str) -> Source:
    """The source that `text` names; it is reached when its pictures are asked for.

    Args:
        text: /dev/videoN, a camera; csi://N, one of a Jetson's; rtsp://, rtsps://, http://,
            https:// or udp://, a stream; or the path of a file, read as if it were live.

    Raises:
        NotFoundError: There is no such file.
        UsageError: Another kind of address, or a camera without a number.
    """
    if re.fullmatch("/dev/video[0-9]+", text):
        return Camera(text, text, "CAP_V4L2")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Recording(Path(text))
    if scheme == "csi":
        if not re.fullmatch("[0-9]{1,2}", rest):
            raise UsageError(
                f"source {text}: expected csi:// and the camera's number, e.g. csi://0"
            )
        return Camera(text, _CSI_PIPELINE.format(number=int(rest)), "CAP_GSTREAMER")
    if scheme.lower() not in _SCHEMES:
        raise UsageError(
            f"source {masked(text)}: expected /dev/videoN, csi://N, "
            f"{'://, '.join(_SCHEMES)}:// or a file"
        )
    return Stream(text)


def masked(url: str) -> str:
    """The URL without what may be secret: names, passwords, its query and parameters."""
    scheme, separator, rest = url.partition("://")
    # To the last @, as people do not always escape what is in their passwords: not even a ? or #.
    secret, _, rest = rest.rpartition("@")
    place = re.match("[^?#;]*", rest)
    assert place is not None  # which may be empty
    mark = rest[place.end() : place.end() + 1]
    hidden = f"{mark}***" if rest[place.end() + 1 :] else ""
    return f"{scheme}{separator}{'***@' * bool(secret)}{place[0]}{hidden}"


class Recording:
    """A video file; see `Source`.

    Args:
        path: The file.

    Raises:
        DataError: Not a file.
        NotFoundError: There is no such file.
    """

    is_recorded = True

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise NotFoundError(f"video {path}: no such file")
        if path.is_dir():
            raise DataError(f"video {path}: not a file")
        self.name = f"video {path}"
        self._path = path

    def shots(self, left: Event) -> Generator[Shot, None, None]:
        """Yields its pictures, in order of presentation; see `Source`."""
        size: tuple[int, int] | None = None
        origin: int | None = None
        try:
            with opened(self._path, left) as source:
                unit = float(source.stream.time_base or 0)
                fps = float(source.stream.average_rate or decoding.LAST_RESORT_FPS)
                for place, frame in enumerate(Decoded(source)):
                    size = size or (frame.width, frame.height)
                    if frame.pts is None:
                        seconds = place / fps
                    else:
                        origin = frame.pts if origin is None else origin
                        seconds = (frame.pts - origin) * unit
                    yield Shot(seconds, partial(upright, frame, *size))
        except Left:
            return
        if size is None:
            raise DataError(f"{self.name}: it holds no frame that can be decoded")


class Stream:
    """A network stream; see `Source`.

    Args:
        url: Of a protocol that FFmpeg knows.
        timeout: Seconds that opening it, and each reading from it, may take.
    """

    is_recorded = False

    def __init__(self, url: str, timeout: float = _TIMEOUT) -> None:
        self.name = f"source {masked(url)}"
        self._url = url
        self._timeout = timeout

    def shots(self, left: Event) -> Generator[Shot, None, None]:
        """Yields its pictures as they come; see `Source`."""
        try:
            import av
        except ImportError as error:
            raise UnavailableError(
                f"reading streams needs PyAV: pip install av ({error})"
            ) from error
        try:
            # FFmpeg's own messages repeat the address, password and all: only its reason is told.
            container = av.open(
                self._url,
                options=_OPTIONS,
                metadata_errors="replace",
                timeout=(self._timeout, self._timeout),
            )
            with container:
                yield from self._read(container, left)
        except (av.FFmpegError, ValueError) as error:
            raise Lost(getattr(error, "strerror", None) or "it cannot be read") from None
        if not left.is_set():
            raise Lost("it ended")

    def _read(self, container: InputContainer, left: Event) -> Generator[Shot, None, None]:
        import av

        stream: VideoStream | None = next(iter(container.streams.video), None)
        if stream is None:
            raise Lost("it has no video")
        if stream.codec_context is None:
            raise UnavailableError(f"{self.name}: FFmpeg here has no decoder for its codec")
        # Whole frames on several threads would come as many frames later.
        stream.thread_type = "SLICE"
        for packet in container.demux(stream):
            if left.is_set():
                return
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:  # such as the rest of a picture that began before
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    yield Shot(None, partial(upright, frame, frame.width, frame.height))


class Camera:
    """A camera by OpenCV; see `Source`.

    Args:
        name: What a person calls it.
        address: What OpenCV opens: a device or a pipeline.
        backend: By which of its backends, the name of one of its constants.
    """

    is_recorded = False

    def __init__(self, name: str, address: str, backend: str) -> None:
        self.name = f"camera {name}"
        self._address = address
        self._backend = backend

    def shots(self, left: Event) -> Generator[Shot, None, None]:
        """Yields its pictures as they come; see `Source`."""
        try:
            import cv2
        except ImportError as error:
            raise UnavailableError(
                f"{self.name}: cameras need OpenCV: pip install 'ppllava-edge[camera]' ({error})"
            ) from error
        backend = int(getattr(cv2, self._backend))
        if backend not in cv2.videoio_registry.getBackends():
            raise UnavailableError(
                f"{self.name}: this OpenCV was built without {self._backend.removeprefix('CAP_')}: "
                "use the system's own, which JetPack brings, instead of pip's"
            )
        with closing(_Capture(cv2.VideoCapture(self._address, backend))) as capture:
            device = capture.device
            if not device.isOpened():
                raise Lost("it cannot be opened")
            device.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            while not left.is_set():
                if not device.grab():
                    raise Lost("it gives no picture")
                yield Shot(None, capture.picture)


@dataclass(frozen=True)
class _Capture:
    """OpenCV's capture, which has `release` for `close`."""

    device: Any

    def picture(self) -> NDArray[np.uint8]:
        """What was grabbed last, as RGB."""
        found, picture = self.device.retrieve()
        if not found:
            raise Lost("it gives a picture that cannot be read")
        return np.ascontiguousarray(picture[..., ::-1])

    def close(self) -> None:
        self.device.release()
