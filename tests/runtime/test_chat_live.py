"""ppllava-chat about what goes on: a file played as if it were live, and streams that break off."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest

from loopback_streams import live_server
from tiny_videos import numbered_frames, write_video

CHAT = "import sys; from ppllava_runtime.chat import run; sys.exit(run())"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-c", CHAT, *map(str, arguments)]


def chat(*arguments: object, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=typed, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(30), fps=20)


def test_answers_one_question_about_a_full_window(bundle: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    live = ("--video-input", clip, "--window", 1, "--rate", 10)
    told = ("--max-new-tokens", 5, "--json", "--heatmap", out)
    done = chat(bundle, *live, "What moves?", *told)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["question"] == "What moves?"
    assert record["answer"]
    assert record["accounting"]["num_frames_encoded"] == 0
    assert record["live"]["encoded"] == record["live"]["kept"] >= len(record["timestamps"]) > 0
    assert record["live"]["seen"] >= 1
    assert record["timestamps"][-1] - record["timestamps"][0] < 1
    assert out.is_file()
    assert done.stderr.startswith("live: 10 frames, 1 s at 10 a second, in at most ")
    assert done.stderr.count("\n") == 1


def test_answers_about_all_there_was_of_a_short_file(bundle: Path, clip: Path) -> None:
    live = ("--video-input", clip, "--window", 10, "--rate", 2)
    done = chat(bundle, "Which?", *live, "--max-new-tokens", 5, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    times, counts = record["timestamps"], record["live"]
    assert times == sorted(set(times) & {0.0, 0.4, 0.9, 1.4})
    assert times[-1] == 1.4
    assert len(times) == counts["kept"] == counts["encoded"]
    assert counts["kept"] + counts["dropped"] == 4  # of which a busy machine may drop some
    assert (counts["seen"], counts["lost"], counts["recovered"]) == (30, 0, 0)


def test_answers_each_line_about_what_is_there_then(bundle: Path, tmp_path: Path) -> None:
    """And the stream breaks off in between."""
    with (
        live_server(tmp_path, fps=50) as server,
        subprocess.Popen(
            command(
                bundle, "--video-input", server.url, "--window", 1, "--rate", 8,
                "--max-new-tokens", 3, "--json",
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):  # fmt: skip
        notes = _Lines(process.stderr)
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(question: str) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(question + "\n")
            process.stdin.flush()
            found: dict[str, Any] = json.loads(process.stdout.readline())
            return found

        records = [ask("first?"), ask("second?")]
        assert "live: 8 frames" in notes.until("live: ")
        server.cut()
        assert "next try in" in notes.until("lost (")
        notes.until("here again")
        # It is here again with its first frame, which may still be with the tower.
        until = time.monotonic() + 30
        while (third := ask("third?"))["timestamps"][-1] == records[1]["timestamps"][-1]:
            assert time.monotonic() < until, "no newer frame came"
        process.stdin.close()
        assert process.wait(30) == 0
    times = [record["timestamps"][-1] for record in (*records, third)]
    assert times == sorted(times)
    assert [record["live"]["recovered"] for record in (*records, third)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--video-input", "CLIP", "a?", "b?"], "instead of VIDEO: leave that out"),
        ([], "the following arguments are required: VIDEO"),
        (["CLIP", "--window", "3"], "--window: of no meaning without --video-input"),
        (["CLIP", "--rate", "3"], "--rate: of no meaning without --video-input"),
        (["--video-input", "CLIP", "--frames", "3"], "--frames: of no meaning for what goes on"),
        (["--video-input", "CLIP", "--fps", "3"], "--fps: of no meaning for what goes on"),
        (["--video-input", "CLIP", "--turns", "keep"], "--turns: of no meaning for what goes on"),
        (["--video-input", "CLIP", "--image", "a.png"], "--image: of no meaning for what goes on"),
        (["--video-input", "CLIP", "--window", "0"], "live: seconds is 0.0"),
        (["--video-input", "CLIP", "--window", "1", "--rate", "1e9"], "frames, expected 2 to"),
        (["--video-input", "ftp://x/y"], "expected /dev/videoN"),
    ],
)
def test_refuses_what_has_no_meaning(
    bundle: Path, clip: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ppllava_engines.errors import run_command
    from ppllava_runtime.chat import main

    words = [str(clip) if word == "CLIP" else word for word in arguments]
    assert run_command(main, [str(bundle), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("typed", [None, "/heatmap {}\n"])
def test_does_not_draw_over_what_it_looks_at(
    bundle: Path, clip: Path, typed: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from ppllava_engines.errors import run_command
    from ppllava_runtime.chat import main

    before = clip.read_bytes()
    words = [str(bundle), "--video-input", str(clip), "--max-new-tokens", "2"]
    words += ["--heatmap", str(clip), "Which?"] if typed is None else []
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Which?\n{typed}".format(clip)))
    assert run_command(main, words) == (2 if typed is None else 0)
    assert "this is what is looked at itself" in capsys.readouterr().err
    assert clip.read_bytes() == before


def test_a_source_that_is_not_there_ends_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ppllava_engines.errors import UnavailableError, run_command
    from ppllava_runtime import feed
    from ppllava_runtime.chat import main

    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/live.ts"
    monkeypatch.setattr(feed, "Patience", partial(feed.Patience, first=0, least=0.001))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which?\nAnd now?\n"))
    code = run_command(main, [str(bundle), "--video-input", url])
    assert code == UnavailableError.exit_code
    assert capsys.readouterr().err.count("no picture came in") == 1


def test_looks_at_so_many_frames_a_second_of_a_file(
    bundle: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ppllava_runtime.chat import main

    main([str(bundle), str(clip), "Which?", "--fps", "4", "--json", "--max-new-tokens", "2"])
    assert len(json.loads(capsys.readouterr().out)["timestamps"]) == 6


class _Lines:
    """The lines of a stream, read as they come so that whoever writes them need not wait."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._found: list[str] = []
        self._stream = stream
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def until(self, words: str, seconds: float = 30) -> str:
        """The first line with these words, which is taken with all before it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for place, line in enumerate(self._found):
                if words in line:
                    del self._found[: place + 1]
                    return line
            self._thread.join(0.01)
        raise AssertionError(f"no {words!r} in {self._found}")

    def _read(self) -> None:
        lines = iter(self._stream)
        for line in lines:
            self._found.append(line)
