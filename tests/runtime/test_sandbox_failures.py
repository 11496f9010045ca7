"""What fails in the sandbox itself: no file is blamed for it, and no other file suffers from it."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from ppllava_engines.errors import SandboxError
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.watching import Shown
from tiny_videos import numbered_frames, write_video

COUNT, SIDE = 40, 512  # more frames than fit into what lies between a process and who reads from it


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = numbered_frames(COUNT, SIDE, SIDE)
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, codec="mpeg4")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(numbered_frames(1, 64, 48)[0]).save(path)
    return path


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opener:
        yield opener


def zygote_of(sandbox: Sandbox) -> int:
    assert sandbox._zygote is not None
    return sandbox._zygote._process.pid


@contextmanager
def half_way(sandbox: Sandbox, clip: Path) -> Iterator[Iterator[Shown]]:
    """The frames of a clip of which one has come, while the zygote has nothing else to do."""
    with closing(sandbox.clip(clip, Sample(COUNT), SIDE, Leaving())) as frames:
        shown = iter(frames)
        assert next(shown)[0] == (0,)
        # What decodes may be ahead of the zygote, whose last descriptor for it is this one.
        folder, end = Path(f"/proc/{zygote_of(sandbox)}/fd"), time.monotonic() + 30
        while not any("pidfd" in os.readlink(path) for path in folder.iterdir()):  # noqa: PTH115 - of what is no path
            assert time.monotonic() < end
        yield shown


def assert_all_come(shown: Iterator[Shown]) -> None:
    """All but the first, which has come."""
    assert {row for rows, _, _ in shown for row in rows} == set(range(1, COUNT))


@contextmanager
def room_for(pid: int, num_descriptors: int) -> Iterator[None]:
    """The block, in which a process can open no more than so many descriptors."""
    there = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = [number for number in range(len(there) + num_descriptors + 1) if number not in there]
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[num_descriptors], hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("room", range(4))
def test_a_zygote_without_descriptors_loses_one_file(
    clip: Path, picture: Path, room: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """It gets none of those of a file, one, two; or all, and none to hold what it forked by."""
    with Sandbox() as sandbox:  # here, as only what starts here is heard
        zygote = zygote_of(sandbox)
        with half_way(sandbox, clip) as shown:
            with room_for(zygote, room), pytest.raises(SandboxError, match=r"image .*: try again"):
                sandbox.still(picture, Leaving())
            assert sandbox.still(picture, Leaving()) is not None
            assert_all_come(shown)
        assert zygote_of(sandbox) == zygote
        assert sandbox.num_broken == 0
    assert "sandbox: a file cannot be decoded: [Errno 24]" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="NOT RUN: root may have any number of processes")
def test_a_zygote_that_cannot_fork_loses_one_file(
    sandbox: Sandbox, clip: Path, picture: Path
) -> None:
    zygote = zygote_of(sandbox)
    with half_way(sandbox, clip) as shown:
        soft, hard = resource.prlimit(zygote, resource.RLIMIT_NPROC)
        resource.prlimit(zygote, resource.RLIMIT_NPROC, (1, hard))
        with pytest.raises(SandboxError, match=r"image .*: try again"):
            sandbox.still(picture, Leaving())
        resource.prlimit(zygote, resource.RLIMIT_NPROC, (soft, hard))
        assert sandbox.still(picture, Leaving()) is not None
        assert_all_come(shown)
    assert zygote_of(sandbox) == zygote


def test_a_fork_that_cannot_be_restricted_decodes_nothing(
    picture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Sandbox(MediaLimits(address_space=1 << 70)) as sandbox:
        with pytest.raises(SandboxError, match=r"image .*: try again"):
            sandbox.still(picture, Leaving())
        assert sandbox.num_broken == 0
    assert "sandbox: a file cannot be decoded: " in capfd.readouterr().err


@pytest.mark.parametrize("room", [1, 3])
def test_who_has_no_descriptors_does_not_end_the_zygote(
    sandbox: Sandbox, clip: Path, picture: Path, room: int
) -> None:
    """Enough to open the file, but not for one or the other wire to who decodes it."""
    zygote = zygote_of(sandbox)
    with half_way(sandbox, clip) as shown:
        with room_for(os.getpid(), room), pytest.raises(SandboxError, match="nothing more can"):
            sandbox.still(picture, Leaving())
        assert_all_come(shown)
    assert zygote_of(sandbox) == zygote
