"""Real streams on the loopback, a real file, and OpenCV: what each gives, and how each fails."""

from __future__ import annotations

import random
import socket
import subprocess
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from shutil import which
from threading import Event
from typing import Literal

import pytest

from clocks import HandClock, reached
from loopback_streams import NUM_NUMBERS, live_server
from ppllava_engines.errors import DataError, NotFoundError, UnavailableError, UsageError
from ppllava_runtime.feed import Feed, Patience
from ppllava_runtime.sources import Camera, Lost, Recording, Source, Stream, masked, open_source
from tiny_videos import numbered_frames, read_number, write_audio, write_video

SOON = Patience(first=60, silence=30, least=0.01, most=0.02)


def numbers(source: Source, count: int) -> list[int]:
    """What the first pictures of a source show."""
    with closing(source.shots(Event())) as shots:
        return [read_number(shot.picture()) for shot in islice(shots, count)]


def has_recovered(feed: Feed, times: int, seen: int = 0) -> bool:
    """Whether it has in time, and has more pictures than were seen before."""
    return reached(lambda: feed.num_recovered == times and feed.num_seen > seen)


def quiet_port() -> int:
    """A free port that no other process is given by chance, nor who connects to it here."""
    while True:
        port = random.randrange(20000, 32000)  # the system's own choice begins above
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("/dev/video0", Camera),
        ("csi://1", Camera),
        ("rtsp://camera/live", Stream),
        ("RTSPS://camera/live", Stream),
        ("http://camera:8080/live.ts", Stream),
        ("https://camera/", Stream),
        ("udp://127.0.0.1:1234", Stream),
    ],
)
def test_opens_what_is_named(text: str, kind: type) -> None:
    assert isinstance(open_source(text), kind)
    assert not open_source(text).is_recorded


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("ftp://me:pass@camera/live", UsageError, "source ftp://***@camera/live: expected /dev"),
        ("concat:a.mp4|b.mp4", NotFoundError, "no such file"),
        ("csi://", UsageError, "e.g. csi://0"),
        ("csi://0 ! filesrc location=x", UsageError, "e.g. csi://0"),
        ("csi://٣", UsageError, "e.g. csi://0"),
        ("missing.mp4", NotFoundError, "video missing.mp4: no such file"),
        (".", DataError, "not a file"),
        ("/dev/video", NotFoundError, "no such file"),
        ("/dev/videoX", NotFoundError, "no such file"),
    ],
)
def test_refuses_what_is_none(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as found:
        open_source(text)
    assert said in str(found.value)
    assert "pass" not in str(found.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rtsp://me:secret@camera/live", "rtsp://***@camera/live"),
        ("rtsp://me:s@e/c@camera:554/live", "rtsp://***@camera:554/live"),
        ("http://camera/live?token=secret", "http://camera/live?***"),
        ("http://me:secret@camera/?key=a@b", "http://***@b"),  # or a password with a ?
        ("rtsp://camera/live", "rtsp://camera/live"),
        ("rtsp://me:se?cret@camera/live", "rtsp://***@camera/live"),
        ("rtsp://me:s#e?c;ret@camera/live?a", "rtsp://***@camera/live?***"),
        ("http://camera/live#secret", "http://camera/live#***"),
        ("rtsp://camera/user=me;password=secret", "rtsp://camera/user=me;***"),
    ],
)
def test_names_no_secrets(url: str, expected: str) -> None:
    assert masked(url) == expected


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_reads_a_stream(kind: Literal["http", "rtsp"], tmp_path: Path) -> None:
    with live_server(tmp_path, kind, fps=100) as server:
        found = numbers(open_source(server.url), 50)
    assert found == [(found[0] + place) % NUM_NUMBERS for place in range(50)]


def test_reads_a_stream_from_its_first_keyframe(tmp_path: Path) -> None:
    """Which is the only one that it has."""
    from threading import Thread

    options = {"g": "250", "tune": "zerolatency"}
    clip = write_video(tmp_path / "clip.ts", numbered_frames(200), options=options)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + clip.read_bytes()
                )

        sending = Thread(target=send, daemon=True)
        sending.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/live.ts"
        assert numbers(open_source(url), 150) == list(range(150))
        sending.join(10)


def test_gives_a_password_and_never_tells_it(tmp_path: Path) -> None:
    with live_server(tmp_path, "rtsp", fps=100, password="sesame") as server:
        assert len(numbers(open_source(server.url), 3)) == 3
        wrong = open_source(server.url.replace("sesame", "simsim"))
        with pytest.raises(Lost) as error:
            numbers(wrong, 1)
        told: list[str] = []
        soon = Patience(0, 2, 0.01, 0.02)
        with (
            Feed(wrong, 10, patience=soon, tell=told.append) as feed,
            pytest.raises(UnavailableError) as given_up,
        ):
            feed.frames.take()
    shown = " ".join([str(error.value), repr(error.value.__context__), str(given_up.value), *told])
    assert "nauthorized" in shown
    assert "***@127.0.0.1" in str(given_up.value)
    assert "simsim" not in str([str(error.value), str(given_up.value), *told])


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_recovers_from_every_drop(kind: Literal["http", "rtsp"], tmp_path: Path) -> None:
    with live_server(tmp_path, kind, fps=200) as server:
        with Feed(open_source(server.url), 50, patience=SOON) as feed:
            for drop in range(5):
                assert feed.frames.take() is not None
                seen = feed.num_seen
                server.cut()
                assert has_recovered(feed, drop + 1, seen)
            # Nobody is there for a while.
            server.cut(refuse=True)
            lost = feed.num_lost
            assert reached(lambda: feed.num_lost >= lost + 3)
            server.cut(refuse=False)
            assert has_recovered(feed, 6)
        assert server.num_plays == 7


def test_leaves_a_stream_that_falls_silent(tmp_path: Path) -> None:
    clock = HandClock()
    with live_server(tmp_path, fps=200) as server:
        with Feed(open_source(server.url), 50, patience=SOON, clock=clock) as feed:
            assert reached(lambda: feed.num_seen > 0)
            server.be_silent()
            assert clock.loses(feed, SOON.silence)
            assert has_recovered(feed, 1)
        assert feed.num_lost == 1


def test_a_reading_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    with live_server(tmp_path, fps=200) as server, ExitStack() as until_the_end:
        # Opening it may take no longer either, which a busy machine may need more for.
        for timeout in (0.5, 5.0, 30.0):
            stream = Stream(server.url, timeout)
            shots = until_the_end.enter_context(closing(stream.shots(Event())))
            with suppress(Lost):
                next(shots)
                break
        server.be_silent()
        with pytest.raises(Lost):
            for _ in shots:
                server.be_silent()  # whoever came too late for its timeout had it speak again


def test_a_stream_cannot_lead_to_files_here(tmp_path: Path) -> None:
    """A playlist from afar that names a file of this machine."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    clip = write_video(tmp_path / "private.ts", numbered_frames(5), options={"g": "1"})
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.2,\nfile://{clip}\n#EXT-X-ENDLIST\n"
    ).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
            self.end_headers()
            self.wfile.write(playlist)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(Lost):
            numbers(open_source(f"http://127.0.0.1:{server.server_port}/live.m3u8"), 1)
        server.shutdown()


def test_reads_a_recording(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(10), options={"bf": "2"})
    source = open_source(str(path))
    assert source.is_recorded
    with closing(source.shots(Event())) as shots:
        found = [(read_number(shot.picture()), round(shot.seconds or 0, 4)) for shot in shots]
    assert found == [(number, number / 25) for number in range(10)]


def test_tells_what_a_recording_is_not(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    for path, said in (
        (text, "not a video"),
        (write_audio(tmp_path / "song.m4a"), "no video stream"),
    ):
        with pytest.raises(DataError) as error:
            numbers(Recording(path), 1)
        assert said in str(error.value)


def test_opencv_gives_the_same_pictures(tmp_path: Path) -> None:
    """Of a file, as there is no camera here: /dev/videoN and csi://N are NOT RUN."""
    pytest.importorskip("cv2", reason="NOT RUN: OpenCV is not installed")
    path = write_video(tmp_path / "clip.avi", numbered_frames(10), codec="mjpeg")
    camera = Camera("of a test", str(path), "CAP_FFMPEG")
    assert numbers(camera, 10) == list(range(10))
    with pytest.raises(Lost, match="gives no picture"):
        numbers(camera, 11)


def test_says_what_a_camera_needs() -> None:
    cv2 = pytest.importorskip("cv2", reason="NOT RUN: OpenCV is not installed")
    with pytest.raises(Lost, match="cannot be opened"):
        numbers(open_source("/dev/video77"), 1)
    if cv2.CAP_GSTREAMER not in cv2.videoio_registry.getBackends():
        with pytest.raises(UnavailableError, match="built without GSTREAMER"):
            numbers(open_source("csi://0"), 1)


GSTREAMER = """
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
server.set_address("127.0.0.1")
server.set_service("0")
factory.set_launch(
    "( videotestsrc is-live=true "
    "! video/x-raw,format=I420,width=96,height=64,framerate=25/1 "
    "! jpegenc ! rtpjpegpay name=pay0 )"
)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


def test_reads_what_a_server_of_gstreamer_serves() -> None:
    python = "/usr/bin/python3"  # which has the system's packages
    process = subprocess.Popen(
        [python, "-I", "-c", GSTREAMER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            if not (port := process.stdout.readline().strip()):
                pytest.skip("NOT RUN: no RTSP server of GStreamer (gir1.2-gst-rtsp-server-1.0)")
            source = open_source(f"rtsp://127.0.0.1:{port}/live")
            with closing(source.shots(Event())) as shots:
                pictures = [shot.picture() for shot in islice(shots, 10)]
        finally:
            process.kill()
    assert {picture.shape for picture in pictures} == {(64, 96, 3)}
    white = pictures[0][10, 3]  # of the colour bars' first
    assert white.min() > 150


def test_reads_what_ffmpeg_serves_and_outlives_it(tmp_path: Path) -> None:
    if (ffmpeg := which("ffmpeg")) is None:
        pytest.skip("NOT RUN: there is no ffmpeg")
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(20), options={"g": "1"})
    url = f"http://127.0.0.1:{quiet_port()}/live.ts"
    serving = [ffmpeg, "-v", "quiet", "-re", "-stream_loop", "-1", "-i", str(clip), "-c", "copy"]
    serving += ["-f", "mpegts", "-listen", "1", url]

    def serve_and_die(feed: Feed) -> None:
        seen = feed.num_seen
        with subprocess.Popen(serving, stdin=subprocess.DEVNULL) as process:
            try:
                assert reached(lambda: feed.num_seen >= seen + 10)
                lost = feed.num_lost
            finally:
                process.kill()
        assert reached(lambda: feed.num_lost > lost)

    with Feed(open_source(url), 25, patience=SOON) as feed:
        for _ in range(3):
            serve_and_die(feed)
        assert feed.num_recovered >= 2
