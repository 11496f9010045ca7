"""Live streams on the loopback, by HTTP and by RTSP, which can be cut off and made silent.

Both send the same MPEG-TS over and over, a frame's share of it at a time.

`python -m benchmarks.loopback_streams VIDEO --fps 5` prints a URL and serves it until its
input ends; each line there cuts all connections off.
"""

from __future__ import annotations

import argparse
import base64
import socket
import socketserver
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Literal

import av

from ppllava_runtime.video import read_clip

Kind = Literal["http", "rtsp"]

_TS_PACKET = 188
_BEGIN = b"\x41\x00"  # of a frame, in the first stream of FFmpeg's
_RTP_PACKETS = 7  # of MPEG-TS in one of RTP
_SECONDS_PER_KEYFRAME = 2
_SDP = (
    "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=loopback\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 33\r\nc=IN IP4 0.0.0.0\r\na=control:track1\r\n"
)


def main(argv: Sequence[str]) -> None:
    """Serves what `argv` says until stdin ends."""
    parser = argparse.ArgumentParser(prog="loopback_streams", description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--fps", type=float, default=5.0)
    parser.add_argument("--kind", choices=("http", "rtsp"), default="http")
    options = parser.parse_args(argv)
    server = LiveServer(options.kind, looped(options.video, options.fps), options.fps)
    print(server.url, flush=True)
    for _ in sys.stdin:
        server.cut()
    server.close()


def looped(video: Path, fps: float) -> bytes:
    """MPEG-TS of a video at a rate, with a keyframe now and then as a camera sends it."""
    info = read_clip(video, 1).info
    num_frames = max(2, round(info.num_frames / info.fps * fps))
    frames = read_clip(video, num_frames).frames
    distance = str(round(_SECONDS_PER_KEYFRAME * fps))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loop.ts"
        with av.open(str(path), "w") as container:
            options = {"g": distance, "preset": "ultrafast", "tune": "zerolatency"}
            rate = Fraction(fps).limit_denominator(1000)
            stream: Any = container.add_stream("libx264", rate=rate, options=options)
            stream.pix_fmt = "yuv420p"
            stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()


class LiveServer(socketserver.ThreadingTCPServer):
    """A camera on a free port of 127.0.0.1, from now on.

    Args:
        kind: What it speaks.
        content: MPEG-TS.
        fps: So many are sent a second.
        password: Of the user "me", which RTSP asks for; empty is none.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        kind: Kind,
        content: bytes,
        fps: float,
        password: str = "",
    ) -> None:
        self.kind = kind
        self.num_plays = 0
        self.parts = _parts(content)
        self.fps = fps
        self.password = password
        self._changed = Condition()
        self._playing: set[socket.socket] = set()
        self._is_silent = False
        self._refuses = False
        super().__init__(("127.0.0.1", 0), _Http if kind == "http" else _Rtsp)
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is."""
        name = f"me:{self.password}@" if self.password else ""
        return f"{self.kind}://{name}127.0.0.1:{self.server_address[1]}/live"

    def cut(self, *, refuse: bool = False) -> None:
        """Cuts all connections off; and, while it refuses, those that come."""
        with self._changed:
            self._refuses = refuse
            for one in self._playing:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def be_silent(self, silent: bool = True) -> None:
        """Keeps connections, and sends nothing by those that are there."""
        with self._changed:
            self._is_silent = silent
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all connections, and takes no more."""
        self.be_silent(False)
        self.cut(refuse=True)
        self.shutdown()
        self.server_close()

    def play(self, connection: socket.socket, send: Callable[[bytes], None]) -> None:
        """Sends, until the connection ends or `cut` ends it."""
        with self._changed:
            if self._refuses:
                return
            self.num_plays += 1
            self._playing.add(connection)
            self._is_silent = False
        try:
            for number in count():
                send(self.parts[number % len(self.parts)])
                with self._changed:
                    self._changed.wait(1 / self.fps)
                    self._changed.wait_for(lambda: not self._is_silent)
        except OSError:
            pass
        finally:
            with self._changed:
                self._playing.discard(connection)

    def handle_error(self, *_: Any) -> None:
        """Cut connections are what is wanted."""


class _Http(socketserver.StreamRequestHandler):
    server: LiveServer

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n\r\n"
        )
        self.server.play(self.connection, self.connection.sendall)


class _Rtsp(socketserver.StreamRequestHandler):
    server: LiveServer

    def handle(self) -> None:
        while first := self.rfile.readline().decode():
            headers = {}
            while line := self.rfile.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            method = first.split()[0]
            if not self._is_allowed(method, headers):
                self._answer(headers, "401 Unauthorized", 'WWW-Authenticate: Basic realm="live"')
            elif method == "DESCRIBE":
                self._answer(headers, "200 OK", "Content-Type: application/sdp", body=_SDP)
            elif method == "SETUP":
                way = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"
                self._answer(headers, "200 OK", way, "Session: 1;timeout=60")
            elif method == "PLAY":
                self._answer(headers, "200 OK", "Session: 1")
                self.server.play(self.connection, self._sender())
                return
            else:
                self._answer(headers, "200 OK", "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")

    def _is_allowed(self, method: str, headers: dict[str, str]) -> bool:
        expected = base64.b64encode(f"me:{self.server.password}".encode()).decode()
        given = headers.get("authorization", "")
        return not self.server.password or method == "OPTIONS" or given == f"Basic {expected}"

    def _answer(self, headers: dict[str, str], status: str, *more: str, body: str = "") -> None:
        lines = [f"RTSP/1.0 {status}", f"CSeq: {headers.get('cseq', '0')}", *more]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())

    def _sender(self) -> Callable[[bytes], None]:
        numbers, begun = count(), count(step=3600)

        def send(part: bytes) -> None:
            time = next(begun)
            for place in range(0, len(part), _RTP_PACKETS * _TS_PACKET):
                payload = part[place : place + _RTP_PACKETS * _TS_PACKET]
                header = struct.pack("!BBHII", 0x80, 33, next(numbers) & 0xFFFF, time, 1)
                packet = header + payload
                self.connection.sendall(struct.pack("!cBH", b"$", 0, len(packet)) + packet)

        return send


def _parts(content: bytes) -> list[bytes]:
    """A frame in each: from the packet with which it begins to that of the next."""
    packets = [content[place : place + _TS_PACKET] for place in range(0, len(content), _TS_PACKET)]
    begins = [place for place, packet in enumerate(packets) if packet[1:3] == _BEGIN]
    return [b"".join(packets[i:end]) for i, end in pairwise([0, *begins[1:], len(packets)])]


if __name__ == "__main__":
    main(sys.argv[1:])
