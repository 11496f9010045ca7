"""Files of a request: what was sent, for nobody else, and gone when it ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from ppllava_engines.errors import StorageError, UsageError
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.errors import ApiError
from ppllava_runtime.server.settings import Settings
from ppllava_runtime.server.spool import Spool

LIMITS = MediaLimits(num_bytes=4 << 20)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    it = Spool(tmp_path / "spool", LIMITS, 6 << 20)
    yield it
    it.close()


class Chunks:
    """Chunks that note whether their generator was closed."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.chunks, self.error, self.closed = chunks, error, False

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self.chunks:
                yield chunk
            if self.error:
                raise self.error
        finally:
            self.closed = True


def files_in(spool: Spool) -> list[Path]:
    return sorted(spool.folder.iterdir())


def test_what_comes_is_in_the_file_until_the_request_ends(spool: Spool) -> None:
    pieces = [os.urandom(size) for size in (1, 0, 700_000, 1 << 20, 12_345)]
    sent = b"".join(pieces)

    async def run() -> None:
        async with spool.request() as files:
            first, empty = await files.add(Chunks(*pieces)()), await files.add(Chunks()())
            assert first.path.read_bytes() == sent
            assert (first.num_bytes, first.sha256) == (len(sent), hashlib.sha256(sent).hexdigest())
            assert (empty.num_bytes, empty.path.read_bytes()) == (0, b"")
            assert first.path.suffix == ""
            assert first.path.stat().st_mode & 0o777 == 0o600
            assert spool.folder.stat().st_mode & 0o777 == 0o700
            assert spool.folder.parent.stat().st_mode & 0o777 == 0o700
            assert spool.num_bytes == len(sent)

    asyncio.run(run())
    assert (files_in(spool), spool.num_bytes) == ([], 0)


def test_a_file_that_is_too_large_is_not_read_to_its_end(spool: Spool) -> None:
    chunks = Chunks(bytes(4 << 20), b"x", b"never")

    async def run() -> None:
        async with spool.request() as files:
            await files.add(chunks())

    with pytest.raises(ApiError) as caught:
        asyncio.run(run())
    assert (caught.value.status, caught.value.code) == (400, "media_too_large")
    assert chunks.closed
    assert (files_in(spool), spool.num_bytes) == ([], 0)


def test_all_files_together_have_a_limit(spool: Spool) -> None:
    async def run() -> None:
        async with spool.request() as one, spool.request() as other:
            await one.add(Chunks(bytes(4 << 20))())
            with pytest.raises(ApiError) as caught:
                await other.add(Chunks(bytes(1 << 20), bytes(1 << 20), b"x")())
            assert caught.value.status == 429
            assert caught.value.headers
            assert spool.num_bytes == 6 << 20
        async with spool.request() as files:
            await files.add(Chunks(bytes(4 << 20))())

    asyncio.run(run())
    assert spool.num_bytes == 0


def test_what_never_fits_is_refused_for_good(spool: Spool) -> None:
    """Not with 429, after which clients send all of it again."""

    async def run() -> None:
        async with spool.request() as other, spool.request() as files:
            await other.add(Chunks(b"x")())
            await files.add(Chunks(bytes(4 << 20))())
            with pytest.raises(ApiError) as caught:
                await files.add(Chunks(bytes(2 << 20))())
            assert caught.value.status == 429  # without the other one it would just about fit
        async with spool.request() as files:
            await files.add(Chunks(bytes(4 << 20))())
            with pytest.raises(ApiError) as caught:
                await files.add(Chunks(bytes(1 << 20), bytes(1 << 20), b"x")())
        assert (caught.value.status, caught.value.code) == (400, "media_too_large")

    asyncio.run(run())
    assert (files_in(spool), spool.num_bytes) == ([], 0)


def test_there_is_room_for_the_largest_file_of_each_request() -> None:
    large = Settings(num_running=3, media=MediaLimits(num_bytes=1 << 30))
    assert large.spool_bytes == 3 << 30
    assert Settings().spool_bytes == 2 << 30


def test_a_source_that_fails_leaves_nothing(spool: Spool) -> None:
    chunks = Chunks(bytes(2 << 20), error=ApiError(400, "no", code="media_fetch_failed"))

    async def run() -> None:
        async with spool.request() as files:
            await files.add(chunks())

    with pytest.raises(ApiError, match="no"):
        asyncio.run(run())
    assert (files_in(spool), spool.num_bytes) == ([], 0)


def test_a_request_that_is_cancelled_leaves_nothing(spool: Spool) -> None:
    async def run() -> None:
        begun = asyncio.Event()

        async def endless() -> AsyncGenerator[bytes, None]:
            yield bytes(3 << 20)
            begun.set()
            await asyncio.Event().wait()

        async def request() -> None:
            async with spool.request() as files:
                await files.add(endless())

        task = asyncio.create_task(request())
        await asyncio.wait_for(begun.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert (files_in(spool), spool.num_bytes) == ([], 0)


def test_a_full_disk_is_told(spool: Spool) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    async def run() -> None:
        async with spool.request() as files:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            try:
                await files.add(Chunks(bytes(3 << 20))())
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        with pytest.raises(StorageError, match="spool"):
            asyncio.run(run())
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    assert (files_in(spool), spool.num_bytes) == ([], 0)


KILLED = """
import os, signal, sys
from pathlib import Path
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.spool import Spool
spool = Spool(Path(sys.argv[1]), MediaLimits())
(spool.folder / "left").write_bytes(b"left")
print(spool.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_left_is_removed_and_what_another_uses_is_not(spool: Spool) -> None:
    folder = spool.folder.parent
    (spool.folder / "used").write_bytes(b"used")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    assert (left / "left").is_file()
    other = Spool(folder, LIMITS)
    assert not left.exists()
    assert (spool.folder / "used").is_file()
    assert sorted(folder.iterdir()) == sorted([spool.folder, other.folder])
    other.close()
    other.close()
    assert sorted(folder.iterdir()) == [spool.folder]


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link", "file/below"):
        with pytest.raises(StorageError, match="choose another folder"):
            Spool(tmp_path / name, LIMITS)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path / "real", 65534, 65534)
    with pytest.raises(UsageError, match="another user"):
        Spool(tmp_path / "real", LIMITS)


def test_a_folder_that_others_could_write_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    Spool(folder, LIMITS).close()
    assert folder.stat().st_mode & 0o777 == 0o700
