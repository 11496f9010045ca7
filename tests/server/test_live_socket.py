"""The WebSocket for live video, spoken to by a client of its own."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from load import Withheld, head, question
from ppllava_runtime import Assistant
from ppllava_runtime.live import LiveVideo
from server_process import Serve, Served
from tiny_videos import numbered_frames

FRAMES = numbered_frames(30)
Event = dict[str, Any]


def picture(frame: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


PICTURES = [picture(frame) for frame in FRAMES]


class Session:
    """What a client says and hears."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def say(self, kind: str, **fields: object) -> None:
        self.connection.send(json.dumps({"type": kind, **fields}))

    def hear(self) -> Event:
        event: Event = json.loads(self.connection.recv(30))
        return event

    def until(self, *kinds: str) -> Event:
        while (event := self.hear())["type"] not in kinds:
            pass
        return event

    def show(self, number: int, seconds: float | None = None) -> None:
        time = number / 2 if seconds is None else seconds
        self.say("video.frame", data=PICTURES[number], timestamp=time)

    def ask(self, text: str, **fields: object) -> Event:
        self.say("video.query", text=text, max_tokens=5, **fields)
        return self.until("response.text.done", "error")

    def show_all(self, first: int, end: int) -> None:
        """Frames one after the other, none of which is dropped as a question waits for each."""
        for number in range(first, end):
            self.show(number)
            self.say("video.query", text="Yes?", max_tokens=1)
            self.until("response.text.done")


@contextmanager
def session(server: Served, **config: object) -> Iterator[Session]:
    url = f"ws://127.0.0.1:{server.port}/v1/video/chat/stream"
    with connect(url) as connection:
        found = Session(connection)
        found.say("session.config", **config)
        started = found.hear()
        assert started["type"] == "session.started", started
        yield found


def closing_code(found: Session) -> int:
    """The code it is closed with, whatever comes before."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            found.hear()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def test_answers_as_the_assistant_does(server: Served, bundle: Path) -> None:
    live = LiveVideo(Assistant.open(bundle), 4, 2)
    with session(server, seconds=4, fps=2, model=server.model, modalities=["text"]) as found:
        found.show_all(0, 11)
        found.say(
            "video.query", text="What moves?", max_tokens=6, id="q1",
            x_ppllava={"relevance": "heatmaps"}, mm_processor_kwargs={"kernel": [1, 2, 2]},
        )  # fmt: skip
        events = [found.hear()]
        while events[-1]["type"] != "response.text.done":
            events.append(found.hear())
        found.say("video.done")
        last = found.hear()
        assert closing_code(found) == 1000
    for number in range(11):
        live.add(FRAMES[number], number / 2)
    expected = live.ask("What moves?", max_new_tokens=6, kernel=(1, 2, 2))
    start, *deltas, done = events
    assert start == {"type": "response.start", "id": "q1"}
    assert {event["type"] for event in deltas} == {"response.text.delta"}
    assert {event["id"] for event in events} == {"q1"}
    assert "".join(event["delta"] for event in deltas) == done["text"] == expected.text
    assert done["finish_reason"] == expected.finish_reason
    assert done["usage"]["completion_tokens"] == 6
    extra = done["x_ppllava"]
    assert extra["relevance"]["timestamps"] == expected.timestamps.tolist()
    np.testing.assert_allclose(extra["relevance"]["curve"], expected.curve(), atol=1e-6)
    assert len(extra["relevance"]["heatmaps"]) == 8
    assert extra["frames"] == {"decoded": 0, "sampled": 8, "encoded": 0}
    counts = {
        "received": 11, "thinned": 0, "dropped": 0, "failed": 0, "kept": 11, "encoded": 11,
    }  # fmt: skip
    assert extra["live"] == counts
    assert last == {"type": "session.done", "frames": counts}


def test_says_at_the_start_what_it_takes(server: Served) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/v1/video/chat/stream") as connection:
        found = Session(connection)
        found.say("session.config")
        started = found.hear()
    assert started.pop("num_bytes") > 0
    assert started.pop("note").startswith("live: 20 frames, 10 s at 2 a second, in at most ")
    assert started == {"type": "session.started", "seconds": 10, "fps": 2, "num_frames": 20}


def test_a_question_is_about_the_frames_before_it(server: Served) -> None:
    with session(server) as found:
        for number in (3, 4, 5):
            found.show(number)
        answer = found.ask("Which?", x_ppllava={"relevance": "curve"})
        assert answer["x_ppllava"]["relevance"]["timestamps"][-1] == 2.5
        found.show(6)
        answer = found.ask("Which?", x_ppllava={"relevance": "curve"})
        assert answer["x_ppllava"]["relevance"]["timestamps"][-1] == 3.0


def test_says_what_became_of_frames_that_come_too_fast(server: Served) -> None:
    count = 30
    with session(server, seconds=10, fps=2) as found:
        for number in range(count):
            found.say("video.frame", data=PICTURES[number], timestamp=number / 2)
        counts = found.ask("Which?", x_ppllava={"relevance": "curve"})["x_ppllava"]["live"]
        assert counts["received"] == count
        assert counts["kept"] + counts["dropped"] == count
        assert counts["failed"] == counts["thinned"] == 0
        # Beyond its rate frames are not even looked at.
        for number in range(10):
            found.say("video.frame", data=PICTURES[0], timestamp=1000 + number / 20)
        assert found.ask("Which?")["x_ppllava"]["live"]["thinned"] == 8


def test_questions_wait_for_each_other(server: Served) -> None:
    with session(server) as found:
        found.show(0)
        for name in ("a", "b", "c"):
            found.say("video.query", text="Which?", max_tokens=3, id=name)
        assert [found.until("response.text.done")["id"] for _ in range(3)] == ["a", "b", "c"]


def test_so_many_questions_may_wait(serve: Serve) -> None:
    """The first of them for its slot, which a request has, and the others for that one."""
    with Withheld() as media:
        server = serve("--private-host", media.host, "--running", 1)
        body = json.dumps(question(server.model, url=media.url)).encode()
        held = socket.create_connection(("127.0.0.1", server.port), 20)
        with held, session(server) as found:
            held.sendall(head(len(body)) + body)
            media.wait_for(1)
            found.show(0)
            found.say("video.query", text="Which?", max_tokens=3, id="0")
            end = time.monotonic() + 30
            while "ppllava_requests_queued 0.0" in httpx2.get(f"{server.url}/metrics").text:
                assert time.monotonic() < end
            for number in range(1, 12):
                found.say("video.query", text="Which?", max_tokens=3, id=str(number))
            refused = [found.until("error") for _ in range(7)]
            assert {event["code"] for event in refused} == {"server_busy"}
            assert [int(event["id"]) for event in refused] == list(range(5, 12))
            found.say("response.cancel")
            cancelled = {found.until("response.cancelled")["id"] for _ in range(5)}
            assert cancelled == set("01234")
            found.say("video.done")
            assert found.hear()["type"] == "session.done"


def test_a_broken_frame_is_told_and_forgotten(server: Served) -> None:
    with session(server) as found:
        found.show_all(0, 1)
        found.say("video.frame", data=base64.b64encode(b"\xff\xd8\xff no").decode(), timestamp=1)
        error = found.hear()
        assert error["param"] == "video.frame"
        assert "of video.frame" in error["message"]
        assert "/" not in error["message"]
        found.say("video.frame", data=base64.b64encode(b"some text").decode(), timestamp=2)
        assert "send JPEG or PNG" in found.hear()["message"]
        found.say("video.frame", data="!", timestamp=3)
        assert "not base64" in found.hear()["message"]
        found.show_all(8, 9)
        found.show(7)
        assert "expected more than 4.0 of the frame before" in found.hear()["message"]
        counts = found.ask("Which?")["x_ppllava"]["live"]
        assert (counts["kept"], counts["failed"]) == (2, 4)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ('{"type": "video.query"}', "video.query.text"),
        ('{"type": "video.query", "text": "a", "n": 2}', "unknown field video.query.n"),
        ('{"type": "video.query", "text": "a", "top_p": 7}', "top_p is 7"),
        ('{"type": "video.query", "text": "  "}', "the question is empty"),
        ('{"type": "video.query", "text": "a", "id": 7}', "video.query.id"),
        ('{"type": "video.query", "text": "a", "id": "\\ud800"}', "video.query.id"),
        ('{"type": "video.query", "text": "\\ud800"}', "messages[0].content is"),
        ('{"type": "video.query", "text": "a", "\\ud800": 1}', "unknown field video.query.\ud800"),
        ('{"type": "video.frame", "data": "\\ud800"}', "not base64"),
        ('{"type": "video.frame", "data": "", "\\ud800": 1}', "video.frame: expected a valid"),
        ('{"type": "video.frame"}', "video.frame.data: Field required"),
        ('{"type": "video.frame", "data": "", "x": 1}', "unknown field video.frame.x"),
        ('{"type": "video.frame", "data": "", "timestamp": 1e400}', "message"),
        ('{"type": "video.frame", "data": "", "timestamp": "1"}', "video.frame.timestamp"),
        ('{"type": "audio.chunk", "data": ""}', "type: expected session.config, video.frame"),
        ('{"type": "session.config"}', "expected session.config first, and no more of it"),
        ('{"type": "video.done", "type": "video.done"}', "message"),
        ("{}", "type: expected"),
        ("[]", "expected an object"),
        ("NaN", "message"),
        ("{", "message"),
        ('{"type": "video.frame", "data": [' + "[]," * 10_000 + "[]]}", "more than 10000 commas"),
        (b"{}", "expected text, got bytes"),
    ],
)
def test_refuses_a_message_and_goes_on(server: Served, message: str | bytes, said: str) -> None:
    with session(server) as found:
        found.show(0)
        found.connection.send(message)
        error = found.until("error")
        assert said in error["message"]
        assert error["code"]
        assert found.ask("Which?")["type"] == "response.text.done"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "video.query", "text": "a"}, "expected session.config first"),
        ({"type": "session.config", "model": "gpt-4"}, "model"),
        ({"type": "session.config", "modalities": ["audio"]}, "modalities"),
        ({"type": "session.config", "max_frames": 50}, "unknown field session.config.max_frames"),
        ({"type": "session.config", "system_prompt": "\ud800"}, "session.config.system_prompt"),
        ({"type": "session.config", "\ud800": 1}, "session.config: expected a valid string"),
        ({"type": "session.config", "seconds": 3600}, "expected at most 20"),
        ({"type": "session.config", "seconds": 0.1}, "expected 2 to"),
        ({"type": "session.config", "fps": -1}, "fps"),
    ],
)
def test_refuses_a_session(server: Served, message: Event, said: str) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/v1/video/chat/stream") as connection:
        found = Session(connection)
        connection.send(json.dumps(message))
        error = found.hear()
        assert error["type"] == "error"
        assert said in error["message"]
        assert closing_code(found) == 1002


def test_half_a_character_ends_no_answers(server: Served) -> None:
    """Neither as the name of a question that is cancelled while it waits."""
    with session(server) as found:
        found.show(0)
        for name in ("a", "\ud800", "b"):
            found.say("video.query", text="Which?", max_tokens=100, id=name)
        assert "video.query.id" in found.until("error")["message"]
        found.say("response.cancel")
        answer = found.ask("Which?", id="after")
        while answer["id"] != "after":  # "a" may have been answered before it was cancelled
            answer = found.until("response.text.done")
        assert answer["type"] == "response.text.done"


def test_asks_before_there_is_a_frame(server: Served) -> None:
    with session(server) as found:
        assert "no frame has come yet" in found.ask("Which?", id="early")["message"]


def test_there_are_so_many_sessions_and_keys_are_asked_for(serve: Serve) -> None:
    key = "0123456789abcdef-test"
    server = serve("--live", 1, env={"PPLLAVA_API_KEYS": key}, key=key)
    url = f"ws://127.0.0.1:{server.port}/v1/video/chat/stream"
    with pytest.raises(InvalidStatus):
        connect(url)
    offered = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    protocols = [Subprotocol("ppllava"), Subprotocol(f"key.{offered}")]
    with connect(url, subprotocols=protocols) as browser:
        first = Session(browser)
        first.say("session.config")
        assert first.hear()["type"] == "session.started"
        assert browser.subprotocol == "ppllava"
        with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as other:
            second = Session(other)
            refused = second.hear()
            assert refused["code"] == "server_busy"
            assert "1 live sessions are running" in refused["message"]
            assert closing_code(second) == 1013
        first.say("video.done")
        assert first.hear()["type"] == "session.done"
        assert closing_code(first) == 1000
    with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as third:
        again = Session(third)
        again.say("session.config")
        assert again.hear()["type"] == "session.started"
        again.show(0)
        assert again.ask("Which?")["type"] == "response.text.done"
        headers = {"authorization": f"Bearer {key}"}
        metrics = httpx2.get(f"{server.url}/metrics", headers=headers).text
        assert 'ppllava_live_frames_total{fate="received"} 1.0' in metrics
        assert 'ppllava_live_frames_total{fate="encoded"} 1.0' in metrics
        assert "ppllava_live_sessions 1.0" in metrics


def test_a_session_without_a_word_ends(serve: Serve) -> None:
    server = serve("--body-timeout", 1)
    with connect(f"ws://127.0.0.1:{server.port}/v1/video/chat/stream") as connection:
        found = Session(connection)
        with suppress(ConnectionClosed):  # it may be as slow to begin
            found.say("session.config")
        assert found.until("error")["code"] == "timeout"
        assert closing_code(found) == 1001


@pytest.mark.parametrize("last", [None, "video.done"])
def test_sigterm_ends_no_answer_that_has_begun(serve: Serve, last: str | None) -> None:
    """It waits for its turn behind a request, which waits for its media."""
    with Withheld() as media:
        server = serve("--private-host", media.host, "--running", 1)
        body = json.dumps(question(server.model, url=media.url)).encode()
        held = socket.create_connection(("127.0.0.1", server.port), 20)
        with held, session(server) as idle, session(server) as found:
            held.sendall(head(len(body)) + body)
            media.wait_for(1)
            found.show(0)
            found.say("video.query", text="Which?", max_tokens=3, id="begun")
            found.say("video.query", text="Which?", id="waits")
            found.say("video.nothing")
            assert found.until("error")["param"] == "type"  # all before it has been read
            if last is not None:
                found.say(last)
            server.process.send_signal(signal.SIGTERM)
            assert closing_code(idle) == 1012
            refused = found.until("error")
            assert (refused["id"], refused["code"]) == ("waits", "not_ready")
            media.release()
            done = found.until("response.text.done")
            assert (done["id"], done["usage"]["completion_tokens"]) == ("begun", 3)
            assert closing_code(found) == 1012
        assert server.process.wait(20) == 0
        assert server.log.read_text() == ""


def test_a_client_that_goes_away_leaves_nothing_behind(serve: Serve) -> None:
    server = serve("--live", 1, "--running", 1, "--queued", 0)
    url = f"ws://127.0.0.1:{server.port}/v1/video/chat/stream"
    num_answers = 0
    until = time.monotonic() + 30
    while num_answers < 5:
        assert time.monotonic() < until
        # Its own queue must not keep it from hearing that the server has closed as well.
        with connect(url, max_queue=None) as connection, suppress(ConnectionClosed):
            found = Session(connection)
            found.say("session.config")
            if found.hear()["type"] != "session.started":  # the one before is just ending
                continue
            found.show(0)
            # Its slot of the answer, which was left half-way, is free as well.
            found.say("video.query", text="Which?", max_tokens=1000)
            assert found.until("response.text.delta", "error")["type"] != "error"
            num_answers += 1
    assert server.stop() == 0
    assert not list((server.log.parent / "spool").rglob("frame"))
    assert server.log.read_text() == ""
