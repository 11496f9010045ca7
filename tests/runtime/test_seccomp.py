"""A process that decodes is taken over, really: what it can do then, and what is left of it."""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent

import pytest

from ppllava_engines.errors import MediaError
from ppllava_runtime import seccomp
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.sandbox import Sandbox
from ppllava_runtime.sandbox_wire import Failed, Job

# Runs in the zygote before all else, and makes of its forks what runs a file as a program.
TAKEN_OVER = """
import ctypes, errno, os, resource, signal, socket, subprocess, sys, threading
from ppllava_engines.errors import MediaError
from ppllava_runtime import pictures, seccomp

def tried(attempt):
    ctypes.set_errno(0)
    try:
        found = attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return errno.errorcode[ctypes.get_errno()] if found == -1 else "done"

def run(path, guard):
    names = dict(globals())
    exec(guard.file(path).read(), names)
    raise MediaError(str(names["found"]))

pictures.read_picture = run
"""
UNFILTERED = TAKEN_OVER + "seccomp.available = lambda: False\n"
NOBODY = 1 << 23  # more than the number of any process: tells who refuses from who looks for it

needs_filter = pytest.mark.skipif(not seccomp.available(), reason="NOT RUN: no seccomp filter here")


def started(folder: Path, taken_over: str, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    (folder / "sitecustomize.py").write_text(taken_over)
    monkeypatch.syspath_prepend(str(folder))
    return Sandbox(MediaLimits(wall_seconds=20)).start()


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with started(tmp_path, TAKEN_OVER, monkeypatch) as opener:
        yield opener


@pytest.fixture
def unfiltered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with started(tmp_path, UNFILTERED, monkeypatch) as opener:
        yield opener


def run(sandbox: Sandbox, folder: Path, program: str) -> str:
    """What a program finds in the process that decodes."""
    path = folder / "program"
    path.write_text(dedent(program))
    with pytest.raises(MediaError) as caught:
        sandbox.still(path, Leaving())
    return str(caught.value)


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process that is nobody's child here has ended by then."""
    until = time.monotonic() + seconds
    while (there := Path(f"/proc/{pid}").exists()) and time.monotonic() < until:
        os.sched_yield()
    return not there


ATTEMPTS = {
    "os.fork()": "EPERM",
    "subprocess.Popen(['/bin/true'], close_fds=False)": "EPERM",
    "os.posix_spawn('/bin/true', ['true'], {})": "EPERM",
    "os.execv('/none', ['none'])": "EPERM",
    "os.open('/dev/null', os.O_RDONLY)": "EPERM",
    "os.open('/none', os.O_RDONLY)": "EPERM",
    "os.memfd_create('none')": "EPERM",
    "socket.socket()": "EPERM",
    "socket.socket(socket.AF_UNIX)": "EPERM",
    "socket.socketpair()": "EPERM",
    "os.kill(os.getppid(), 0)": "EPERM",
    f"os.kill({NOBODY}, 0)": "EPERM",
    f"os.killpg({NOBODY}, 0)": "EPERM",
    "os.kill(0, 0)": "EPERM",
    "os.kill(-1, 0)": "EPERM",
    f"os.pidfd_open({NOBODY})": "ENOSYS",
    f"resource.prlimit({NOBODY}, resource.RLIMIT_CPU)": "EPERM",
    f"os.sched_setaffinity({NOBODY}, {{0}})": "EPERM",
    "os.setsid()": "EPERM",
    "os.unlink('/none')": "EPERM",
    "os.rename('/none', '/other')": "EPERM",
    "os.chmod(4, 0o777)": "EPERM",
    "os.mkdir('/none/none')": "EPERM",
    "os.chdir('/')": "EPERM",
    "LIBC.ptrace(0, 0, 0, 0)": "EPERM",
    "LIBC.unshare(0)": "EPERM",
    "LIBC.personality(-1)": "EPERM",
    "LIBC.prctl(1, 0, 0, 0, 0)": "EPERM",  # would let it outlive its parent
    "LIBC.fcntl(3, 8, 1)": "EPERM",  # would have signals sent to another
    "LIBC.syscall(435, 0, 0)": "ENOSYS",  # clone3
    "LIBC.syscall(425, 1, 0)": "ENOSYS",  # io_uring_setup
    "os.kill(os.getpid(), 0)": "done",
    "resource.getrlimit(resource.RLIMIT_AS)": "done",
}


@needs_filter
class TestAProcessThatWasTakenOver:
    def test_is_refused_what_reaches_others(self, sandbox: Sandbox, tmp_path: Path) -> None:
        lines = [f"tried(lambda: {attempt})," for attempt in ATTEMPTS]
        program = "LIBC = ctypes.CDLL(None, use_errno=True)\n"
        program += "for used in (0, 1, 2): os.close(used)\n"  # room for others
        program += "found = ' '.join([\n" + "\n".join(lines) + "\n])\n"
        found = run(sandbox, tmp_path, program).split()
        assert dict(zip(ATTEMPTS, found, strict=True)) == ATTEMPTS
        assert sandbox.num_broken == 0

    def test_makes_threads(self, sandbox: Sandbox, tmp_path: Path) -> None:
        program = """
            seen = []
            threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(3)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            found = sorted(seen)
            """
        assert run(sandbox, tmp_path, program) == "[0, 1, 2]"

    def test_that_aborts_ends_by_that_signal(self, sandbox: Sandbox, tmp_path: Path) -> None:
        for program, name in (("os.abort()", "SIGABRT"), ("signal.raise_signal(11)", "SIGSEGV")):
            assert run(sandbox, tmp_path, program).endswith(f"it broke its decoder ({name})")


class TestWithoutAFilter:
    def test_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        program = "found = tried(lambda: os.open('/dev/null', 0))"
        with started(tmp_path, UNFILTERED, monkeypatch) as sandbox:
            assert [run(sandbox, tmp_path, program) for _ in range(2)] == ["EMFILE"] * 2
        assert capfd.readouterr().err.count("this system knows no seccomp filter") == 1

    def test_what_a_process_leaves_ends_with_it(self, unfiltered: Sandbox, tmp_path: Path) -> None:
        program = """
            for used in (0, 1, 2): os.close(used)
            mine, its = os.pipe()
            if os.fork() == 0:
                os.setsid()
                os.fork()
                os.write(its, os.getpid().to_bytes(4, "big"))
                while True: signal.pause()
            found = [int.from_bytes(os.read(mine, 4), "big") for _ in range(2)]
            """
        found = run(unfiltered, tmp_path, program).strip("[]").split(", ")
        assert len(found) == 2
        assert all(ended(int(pid)) for pid in found)
        assert run(unfiltered, tmp_path, "found = 'next'") == "next"

    def test_what_a_process_makes_ends_with_the_sandbox(
        self, unfiltered: Sandbox, tmp_path: Path
    ) -> None:
        path = tmp_path / "program"
        path.write_text(
            "from ppllava_runtime.sandbox_wire import Failed, send\n"
            "pid = os.fork()\n"
            "if pid: send(socket.socket(fileno=3), Failed(f'{pid} {os.getpid()}'))\n"
            "else: os.setsid()\n"
            "while True: signal.pause()\n"
        )
        job = Job(str(path), "still", Sample(), 0, unfiltered.limits)
        with closing(unfiltered.begin("image", job, Leaving())) as process:
            # Not `take`, which would wait for its end.
            length = int.from_bytes(process._exactly(4), "big")
            said = bytes(process._exactly(length)).decode()
            assert Failed.__name__ in said
            pids = [int(word) for word in said.replace('"', " ").split() if word.isdigit()]
            assert len(pids) == 2
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
            unfiltered.close()
            assert all(ended(pid) for pid in pids)


def decided(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What a filter answers, as the kernel reads it."""
    data = struct.pack("=IIQQ", number, architecture, 0, argument)
    place = value = 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return int(operand)
        else:
            assert code in (0x15, 0x35)
            meets = value == operand if code == 0x15 else value >= operand
            place += if_true if meets else if_false


@pytest.mark.parametrize(
    ("machine", "architecture", "openat", "sendto", "kill", "clone"),
    [("x86_64", 0xC000003E, 257, 44, 62, 56), ("aarch64", 0xC00000B7, 56, 206, 129, 220)],
)
def test_the_filter_of_either_machine_decides_the_same(
    machine: str, architecture: int, openat: int, sendto: int, kill: int, clone: int
) -> None:
    filter, allowed, refused = seccomp.program(machine, 77), 0x7FFF0000, 0x00050000 | errno.EPERM
    assert len(filter) // 8 <= 4096
    assert decided(filter, architecture, openat) == refused
    assert decided(filter, architecture, sendto) == allowed
    for pid, answer in ((77, allowed), (78, refused), (0, refused), (2**32 - 77, refused)):
        assert decided(filter, architecture, kill, pid) == answer
    for flags, answer in (
        (0x3D0F00, allowed),  # of a thread
        (0x1200011, refused),  # of a fork
        (0x4111, refused),  # of vfork
        (0x10000 | 0x10000000, refused),  # of a thread among other users
    ):
        assert decided(filter, architecture, clone, flags) == answer
    for number in (435, 500, 0x40000000 | openat):
        assert decided(filter, architecture, number) == 0x00050000 | errno.ENOSYS
    assert decided(filter, 0x40000003, sendto) == 0x80000000


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: it is Linux's")
def test_asking_whether_there_is_a_filter_installs_none() -> None:
    seccomp.available()
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    assert "Seccomp_filters:\t0" in status or "Seccomp:\t0" in status
