"""A new bundle is there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ppllava_engines import staging as staging_module
from ppllava_engines.bundle import MANIFEST, Bundle, new_bundle
from ppllava_engines.errors import DataError, StorageError, UsageError
from tiny_bundle import write_bundle

# Fills a staging folder, says so, and goes on when told to.
WORKER = """
import sys
from pathlib import Path
from ppllava_engines.bundle import new_bundle
from tiny_bundle import write_bundle
with new_bundle(sys.argv[1], overwrite=True) as staging:
    write_bundle(staging)
    print(staging.name, flush=True)
    sys.stdin.readline()
"""

COMMAND = f"""
import sys
from ppllava_engines.errors import run_command
sys.exit(run_command(lambda _: exec({WORKER!r})))
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "home" / "bundle"


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a folder; the second is for file systems without the first."""
    if request.param == "two renames":
        monkeypatch.setattr(staging_module, "_exchange", lambda *_: False)


def make(out: Path, mark: str, overwrite: bool = False) -> None:
    with new_bundle(out, overwrite) as staging:
        write_bundle(staging)
        (staging / "mark").write_text(mark)


def mark(out: Path) -> str:
    Bundle.open(out)
    return (out / "mark").read_text()


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


@contextmanager
def worker(out: Path, script: str = WORKER) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_new_bundle_takes_its_place(out: Path) -> None:
    with new_bundle(out, overwrite=False) as staging:
        write_bundle(staging)
        assert staging.parent == out.parent
        assert not out.exists()
    Bundle.open(out, verify="full")
    assert beside(out) == ["bundle"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.usefixtures("swap")
def test_a_previous_bundle_is_replaced(out: Path) -> None:
    make(out, "old")
    make(out, "new", overwrite=True)
    assert mark(out) == "new"
    assert beside(out) == ["bundle"]


def test_a_link_to_a_bundle_stays_a_link(out: Path, tmp_path: Path) -> None:
    make(out, "old")
    (tmp_path / "link").symlink_to(out)
    make(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert mark(out) == "new"


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(out: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), new_bundle(out, overwrite=False) as staging:
        write_bundle(staging)
        raise failure
    assert not out.parent.exists()
    make(out, "old")
    with pytest.raises(failure), new_bundle(out, overwrite=True) as staging:
        write_bundle(staging)
        raise failure
    assert mark(out) == "old"
    assert beside(out) == ["bundle"]


def test_what_is_no_bundle_is_not_put_in_place(out: Path) -> None:
    make(out, "old")
    with pytest.raises(DataError, match="is missing"), new_bundle(out, overwrite=True) as staging:
        write_bundle(staging)
        (staging / "graphs/scale.onnx").unlink()
    assert mark(out) == "old"


def test_overwriting_must_be_asked_for(out: Path) -> None:
    make(out, "old")
    with pytest.raises(UsageError, match="is there already"), new_bundle(out, overwrite=False):
        pytest.fail("the work began")
    assert mark(out) == "old"
    assert beside(out) == ["bundle"]


def test_what_someone_else_made_is_never_replaced(out: Path) -> None:
    out.mkdir(parents=True)
    make(out, "over an empty folder")
    (out / MANIFEST).unlink()
    with pytest.raises(UsageError, match=r"has no manifest\.json"), new_bundle(out, overwrite=True):
        pytest.fail("the work began")
    assert (out / "mark").is_file()
    with (
        pytest.raises(UsageError, match=r"has no manifest\.json"),
        new_bundle(out / "mark", overwrite=True),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize(
    "text", ['{"name": "extension"}', '{"schema_version": 1, "graphs": {}}', "[]", "{", "\xff", ""]
)
def test_a_manifest_of_something_else_is_never_replaced(out: Path, text: str) -> None:
    out.mkdir(parents=True)
    (out / MANIFEST).write_bytes(text.encode("latin-1"))
    with (
        pytest.raises(UsageError, match=r"no manifest\.json with decoder, graphs, schema_version"),
        new_bundle(out, overwrite=True),
    ):
        pytest.fail("the work began")
    assert beside(out) == ["bundle"]
    assert (out / MANIFEST).read_bytes() == text.encode("latin-1")


def test_a_bundle_of_another_version_is_replaced_when_asked(out: Path) -> None:
    out.mkdir(parents=True)
    text = '{"schema_version": 9, "graphs": 0, "decoder": 0, "more": 0}'
    (out / MANIFEST).write_text(text)
    make(out, "new", overwrite=True)
    assert mark(out) == "new"


def test_a_failure_leaves_no_folder_that_was_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), new_bundle(tmp_path / "a/b/c/bundle", False) as staging:
        assert staging.parent == tmp_path / "a/b/c"
        (tmp_path / "a/b/note").write_text("someone else's")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["note"]
    with pytest.raises(RuntimeError), new_bundle(tmp_path / "d/e/bundle", False):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_command_that_is_terminated_leaves_nothing(out: Path) -> None:
    with worker(out, COMMAND) as (process, staging):
        assert (out.parent / staging).is_dir()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert not out.parent.exists()
    make(out, "old")
    with worker(out, COMMAND) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert mark(out) == "old"
    assert beside(out) == ["bundle"]


def test_what_came_meanwhile_is_not_replaced(out: Path) -> None:
    with pytest.raises(UsageError, match="is there already"), new_bundle(out, False) as staging:
        write_bundle(staging)
        make(out, "quicker")
    assert mark(out) == "quicker"
    assert beside(out) == ["bundle"]


def test_a_killed_process_leaves_the_previous_bundle_and_the_next_one_cleans(out: Path) -> None:
    make(out, "old")
    with worker(out) as (process, staging):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert mark(out) == "old"
    assert beside(out) == [staging, "bundle"]
    with pytest.raises(RuntimeError), new_bundle(out, overwrite=True):
        raise RuntimeError
    assert beside(out) == ["bundle"]
    assert mark(out) == "old"


def test_what_another_process_works_on_is_left_alone(out: Path) -> None:
    with worker(out) as (process, staging):
        make(out, "mine")
        assert beside(out) == [staging, "bundle"]
        process.communicate("go on\n")
        assert process.returncode == 0
    Bundle.open(out)
    assert not (out / "mark").exists()
    assert beside(out) == ["bundle"]


def test_a_swap_that_was_cut_short_is_undone(out: Path) -> None:
    make(out, "old")
    out.rename(out.with_name(".bundle.previous"))  # as two renames do, and then the power went
    with pytest.raises(RuntimeError), new_bundle(out, overwrite=True):
        raise RuntimeError
    assert mark(out) == "old"
    assert beside(out) == ["bundle"]


def test_what_a_finished_swap_left_is_removed(out: Path) -> None:
    make(out, "new")
    make(out.with_name(".bundle.previous"), "old")
    make(out, "newer", overwrite=True)
    assert mark(out) == "newer"
    assert beside(out) == ["bundle"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_of_anybody_else_beside_it_stays(out: Path, there: bool, overwrite: bool) -> None:
    previous = out.with_name(".bundle.previous")
    previous.mkdir(parents=True)
    (previous / "mine.txt").write_text("mine")
    (previous / MANIFEST).write_text('{"name": "extension"}')
    if there:
        make(out, "old")
    with suppress(UsageError):
        make(out, "new", overwrite)
    assert mark(out) == ("old" if there and not overwrite else "new")
    assert (previous / "mine.txt").read_text() == "mine"


def test_nothing_is_removed_before_it_may_be_replaced(out: Path) -> None:
    make(out, "new")
    make(out.with_name(".bundle.previous"), "old")
    (out.parent / ".bundle.partial-12345678").mkdir()
    before = beside(out)
    with pytest.raises(UsageError, match="is there already"):
        make(out, "newer")
    assert beside(out) == before
    assert mark(out.with_name(".bundle.previous")) == "old"


def test_what_is_left_of_a_removal_that_was_cut_short_is_removed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "_exchange", lambda *_: False)
    make(out, "old")
    unlink = Path.unlink

    def stopping(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == ".bundle.previous" and self.name == MANIFEST:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stopping)
        make(out, "new", overwrite=True)
    assert [path.name for path in out.with_name(".bundle.previous").iterdir()] == [MANIFEST]
    make(out, "newer", overwrite=True)
    out.with_name(".bundle.previous").mkdir()  # as if it had been stopped one step later
    make(out, "newest", overwrite=True)
    assert mark(out) == "newest"
    assert beside(out) == ["bundle"]


def test_a_swap_that_another_process_is_at_is_left_alone(out: Path) -> None:
    make(out, "old")
    previous = out.with_name(".bundle.previous")
    with staging_module._locked(out):
        out.rename(previous)
        make(out, "mine")
        assert mark(previous) == "old"
    assert mark(out) == "mine"


def test_when_only_the_last_sync_fails_the_new_folder_is_in_place(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(out, "old")
    sync = staging_module._sync_one

    def failing(path: Path) -> None:
        if path == out.parent:
            raise OSError(errno.EIO, "broken")
        sync(path)

    monkeypatch.setattr(staging_module, "_sync_one", failing)
    with pytest.raises(StorageError, match="the new folder is in place, but"):
        make(out, "new", overwrite=True)
    assert mark(out) == "new"
    assert beside(out) == ["bundle"]


def test_a_second_rename_that_fails_is_undone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(out, "old")
    monkeypatch.setattr(staging_module, "_exchange", lambda *_: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="cannot put the new folder in place"):
        make(out, "new", overwrite=True)
    assert mark(out) == "old"
    assert beside(out) == ["bundle"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="cannot make a folder beside it"),
        new_bundle(tmp_path / "file" / "bundle", overwrite=False),
    ):
        pytest.fail("the work began")
