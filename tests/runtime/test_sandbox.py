"""What a sandbox makes of good files is what this process makes of them; how it lives and dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mutations import sound_videos
from ppllava_engines.errors import (
    DataError,
    MediaError,
    NotFoundError,
    SandboxError,
    StorageError,
    UsageError,
)
from ppllava_runtime import Assistant
from ppllava_runtime.choosing import Sample, choose_frames
from ppllava_runtime.leaving import Leaving, Left
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.local import LOCAL
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.video import ClipInfo
from ppllava_runtime.watching import Opener, Shown
from tiny_videos import numbered_frames, read_number, write_audio, write_video

SIZE = 56
FRAMES = numbered_frames(14, 64, 48)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opener:
        yield opener


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", FRAMES)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose frames do not fit into what lies between a process and who reads from it."""
    frames = numbered_frames(40, 512, 512)
    return write_video(tmp_path_factory.mktemp("long") / "clip.mp4", frames, codec="mpeg4")


def taken(opener: Opener, path: Path, sample: Sample) -> tuple[list[Shown], ClipInfo]:
    with closing(opener.clip(path, sample, SIZE, Leaving())) as frames:
        shown = list(frames)
        assert frames.num_rows == len({row for rows, _, _ in shown for row in rows})
        return shown, frames.info


def assert_the_same(sandbox: Sandbox, path: Path, sample: Sample) -> None:
    shown, info = taken(sandbox, path, sample)
    expected, expected_info = taken(LOCAL, path, sample)
    assert [rows for rows, _, _ in shown] == [rows for rows, _, _ in expected]
    for (_, *pictures), (_, *others) in zip(shown, expected, strict=True):
        for picture, other in zip(pictures, others, strict=True):
            np.testing.assert_array_equal(picture, other)
    np.testing.assert_array_equal(info.timestamps, expected_info.timestamps)
    for name in ("indices", "num_frames", "num_decoded", "fps", "damage"):
        assert getattr(info, name) == getattr(expected_info, name), name


def forks(sandbox: Sandbox) -> list[int]:
    """The processes of the sandbox that decode."""
    zygote = sandbox._zygote
    assert zygote is not None
    pid = zygote._process.pid
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def fork_of(sandbox: Sandbox) -> int:
    """The one that decodes, when those before it have been buried."""
    until = time.monotonic() + 10
    while len(found := forks(sandbox)) != 1:
        assert time.monotonic() < until
        os.sched_yield()
    return found[0]


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process that is nobody's child here has ended by then."""
    until = time.monotonic() + seconds
    while (there := Path(f"/proc/{pid}").exists()) and time.monotonic() < until:
        os.sched_yield()
    return not there


class TestAGoodFile:
    def test_of_every_kind_is_what_it_is_here(self, sandbox: Sandbox, tmp_path: Path) -> None:
        for name in sound_videos(tmp_path):
            assert_the_same(sandbox, tmp_path / name, Sample(5))

    @pytest.mark.parametrize(
        "sample",
        [Sample(30), Sample(fps=7.5, most=16), Sample(4, None, 0.1, 0.3), Sample(3, 25.0)],
        ids=str,
    )
    def test_is_sampled_as_it_is_here(self, sandbox: Sandbox, clip: Path, sample: Sample) -> None:
        assert_the_same(sandbox, clip, sample)

    def test_that_is_real_is_what_it_is_here(self, sandbox: Sandbox, real: Path) -> None:
        paths = [path for path in sorted(real.iterdir()) if path.suffix != ".md"]
        assert len(paths) > 5
        for path in paths:
            assert_the_same(sandbox, path, Sample(6))

    @pytest.mark.parametrize(
        "format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "I;16", "CMYK"]
    )
    def test_that_is_a_picture_is_what_it_is_here(
        self, sandbox: Sandbox, tmp_path: Path, format: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(FRAMES[5])
        options: dict[str, Any] = {"exif": exif, "format": format}
        if format == "I;16":
            grey = np.asarray(picture.convert("L")).astype("<u2") << 8
            picture, options = Image.fromarray(grey), {"format": "TIFF", "exif": exif}
        if format == "CMYK":
            picture, options = picture.convert("CMYK"), {"format": "TIFF"}
        if format in ("GIF", "BMP"):
            del options["exif"]
        if format == "TIFF":
            options |= {"save_all": True, "append_images": [picture]}
        path = tmp_path / "picture"
        picture.save(path, **options)
        found, expected = sandbox.still(path, Leaving()), LOCAL.still(path, Leaving())
        assert found is not None
        assert expected is not None
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1] == expected[1]
        assert (format == "TIFF") == (found[1] is not None)

    def test_that_is_a_video_is_no_picture(self, sandbox: Sandbox, clip: Path) -> None:
        assert sandbox.still(clip, Leaving()) is None

    def test_is_seen_by_an_assistant_as_without(
        self, sandbox: Sandbox, bundle: Path, clip: Path
    ) -> None:
        memories = [
            Assistant.open(bundle, decoding=opener).watch(clip, 4).memory
            for opener in (sandbox, LOCAL)
        ]
        first, second = (memory.arrays for memory in memories)
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])

    def test_may_be_one_of_several_at_once(self, sandbox: Sandbox, clip: Path) -> None:
        def numbers(start: float) -> list[int]:
            shown, _ = taken(sandbox, clip, Sample(4, None, start))
            return [read_number(thumbnail) for _, _, thumbnail in shown]

        starts = [place / 25 for place in range(10)] * 3
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(numbers, starts))
        expected = [choose_frames(14, 4, 25, start) for start in starts]
        assert found == [sorted(set(places)) for places in expected]

    def test_may_have_any_name(self, sandbox: Sandbox, clip: Path, tmp_path: Path) -> None:
        for name in ("concat:a|b", "ä\n\x7f", "x.m3u8", os.fsdecode(b"\xff\xfe.mp4")):
            path = tmp_path / name
            path.write_bytes(clip.read_bytes())
            assert len(taken(sandbox, path, Sample(3))[0]) == 3


class TestAFileThatIsNone:
    def test_is_said_so(self, sandbox: Sandbox, tmp_path: Path) -> None:
        pipe, missing = tmp_path / "pipe", tmp_path / "missing"
        os.mkfifo(pipe)
        with pytest.raises(NotFoundError, match=r"image .*missing: no such file"):
            sandbox.still(missing, Leaving())
        with pytest.raises(NotFoundError, match=r"video .*missing: no such file"):
            taken(sandbox, missing, Sample(1))
        for path in (tmp_path, pipe):
            with pytest.raises(DataError, match="not a file"):
                sandbox.still(path, Leaving())
        with pytest.raises(StorageError, match="cannot be opened"):
            sandbox.still(tmp_path / ("n" * 300), Leaving())

    def test_that_has_no_pictures_is_a_media_error(self, sandbox: Sandbox, tmp_path: Path) -> None:
        sound = write_audio(tmp_path / "sound.m4a")
        text = tmp_path / "text.mp4"
        text.write_text("no video")
        for path, reason in ((sound, "it has no video stream"), (text, "not a video")):
            with pytest.raises(MediaError, match=reason):
                taken(sandbox, path, Sample(1))

    def test_of_a_span_beside_it_is_wrong_usage(self, sandbox: Sandbox, clip: Path) -> None:
        with pytest.raises(UsageError, match="the span starts at 9"):
            taken(sandbox, clip, Sample(2, None, 9.0))


class TestAProcess:
    def test_that_decodes_may_do_nothing_else(self, sandbox: Sandbox, long_clip: Path) -> None:
        with closing(sandbox.clip(long_clip, Sample(40), 512, Leaving())) as frames:
            next(iter(frames))
            pid = fork_of(sandbox)
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            limits = Path(f"/proc/{pid}/limits").read_text()
            links = [str(path.readlink()) for path in sorted(Path(f"/proc/{pid}/fd").iterdir())]
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Threads"].strip() == "1"
        users = Path("/proc/self/uid_map").read_text().split()
        if os.geteuid() == 0 and users == ["0", "0", str(2**32 - 1)]:
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Groups"].split() == []
        # As many descriptors as it may have, so that it can open nothing.
        assert len(links) == 5
        assert links[:3] == [os.devnull] * 3
        assert links[4] == str(long_clip)
        found = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
        assert found["Max open files"] == ["5", "5"]
        assert found["Max address space"] == [str(sandbox.limits.address_space)] * 2
        assert found["Max cpu time"] == ["60", "61"]
        assert found["Max file size"] == ["0", "0"]
        assert found["Max core file size"] == ["0", "0"]
        assert b"PPLLAVA" not in environment
        assert b"HOME=" not in environment

    def test_ends_when_nobody_wants_more(self, sandbox: Sandbox, long_clip: Path) -> None:
        frames = sandbox.clip(long_clip, Sample(40), 512, Leaving())
        next(iter(frames))
        pid = fork_of(sandbox)
        frames.close()
        assert ended(pid)
        with closing(sandbox.clip(long_clip, Sample(4), 512, Leaving())):
            pass  # none was taken
        assert forks(sandbox) == []

    def test_ends_when_who_waits_for_it_leaves(self, sandbox: Sandbox, long_clip: Path) -> None:
        broken, leaving = sandbox.num_broken, Leaving()
        with closing(sandbox.clip(long_clip, Sample(40), 512, leaving)) as frames:
            shown = iter(frames)
            next(shown)
            pid = fork_of(sandbox)
            os.kill(pid, signal.SIGSTOP)  # it takes its time
            leaving.leave()
            leaving.end()
            with pytest.raises(Left):
                list(shown)
        assert ended(pid)
        assert sandbox.num_broken == broken

    def test_that_breaks_costs_one_file(
        self, sandbox: Sandbox, long_clip: Path, clip: Path
    ) -> None:
        broken = sandbox.num_broken
        with closing(sandbox.clip(long_clip, Sample(40), 512, Leaving())) as frames:
            shown = iter(frames)
            next(shown)
            pid = fork_of(sandbox)
            other, _ = taken(sandbox, clip, Sample(3))
            os.kill(pid, signal.SIGSEGV)
            with pytest.raises(MediaError, match=r"video .*: it broke its decoder \(SIGSEGV\)"):
                list(shown)
        assert len(other) == 3
        assert sandbox.num_broken == broken + 1
        assert_the_same(sandbox, clip, Sample(3))

    def test_that_forks_is_started_again(self, long_clip: Path, clip: Path) -> None:
        with Sandbox() as sandbox:
            frames = sandbox.clip(long_clip, Sample(40), 512, Leaving())
            next(iter(frames))
            pid = fork_of(sandbox)
            assert sandbox._zygote is not None
            os.kill(sandbox._zygote._process.pid, signal.SIGKILL)
            assert ended(pid), "a process survives the one that made it"
            with closing(frames), pytest.raises(SandboxError, match="was ended from outside"):
                list(frames)
            assert sandbox.num_broken == 0
            assert_the_same(sandbox, clip, Sample(3))

    def test_that_forks_does_not_mind_what_ends_others(self, clip: Path) -> None:
        with Sandbox() as sandbox:
            assert sandbox._zygote is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                sandbox._zygote._process.send_signal(number)
            pid = sandbox._zygote._process.pid
            assert_the_same(sandbox, clip, Sample(3))
            assert sandbox._zygote._process.pid == pid

    def test_ends_with_the_sandbox(self, long_clip: Path) -> None:
        sandbox = Sandbox()
        frames = sandbox.clip(long_clip, Sample(40), 512, Leaving())  # which starts it
        next(iter(frames))
        pids = forks(sandbox)
        assert sandbox._zygote is not None
        pids.append(sandbox._zygote._process.pid)
        sandbox.close()
        sandbox.close()
        assert all(ended(pid) for pid in pids)
        with closing(frames), pytest.raises(SandboxError, match="was ended from outside"):
            list(frames)
        with pytest.raises(UsageError, match="the sandbox was closed"):
            sandbox.still(long_clip, Leaving())


def test_a_sandbox_that_does_not_start_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere"])
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SandboxError, match=r"did not start \(exit code 1\)"):
        Sandbox(MediaLimits()).start()
    monkeypatch.setattr("sys.executable", "/nowhere")
    with pytest.raises(SandboxError, match=r"cannot be started .*/nowhere"):
        Sandbox(MediaLimits()).start()
    assert capfd.readouterr().out == ""
