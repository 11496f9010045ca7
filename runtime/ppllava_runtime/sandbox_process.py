"""A process that decodes one file, and the one that forks it, as they are seen from outside."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from socket import AF_UNIX, SHUT_RDWR, SOCK_SEQPACKET, SOCK_STREAM, send_fds, socket, socketpair
from threading import Lock
from typing import Any, TypeVar, overload

import numpy as np

from ppllava_engines.errors import DataError, MediaError, SandboxError, UsageError
from ppllava_engines.strict_json import decode, loads
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.sandbox_wire import (
    ENDED_BYTES,
    HEADER_BYTES,
    LENGTH_BYTES,
    READY,
    Ended,
    Failed,
    Job,
    Message,
    packed,
)
from ppllava_runtime.watching import Picture

One = TypeVar("One", bound=Message)
Other = TypeVar("Other", bound=Message)

_START_SECONDS = 60.0
_TAKING_SECONDS = 5.0  # for the zygote to take a job up, or its end
_END_SECONDS = 20.0  # for a process that has said its last word, or was killed
_MOST_TEXT = 2000  # characters of what a process says
# What of the environment Python and the libraries need; keys and such are nobody's business there.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


class Tally:
    """What became of the processes; any thread may add to it.

    Attributes:
        num_broken: How many broke, or were ended for breaking a limit.
        peak_bytes: The most memory that one of them had in use.
    """

    def __init__(self) -> None:
        self.num_broken = 0
        self.peak_bytes = 0
        self._lock = Lock()

    def add(self, ended: Ended | None, broken: bool) -> None:
        """Counts one."""
        with self._lock:
            self.num_broken += broken
            self.peak_bytes = max(self.peak_bytes, ended.peak_bytes if ended else 0)


class Zygote:
    """The process that forks those that decode.

    Raises:
        SandboxError: It does not start.
    """

    def __init__(self) -> None:
        self._control, its = _wire(SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # As this process finds them, from a folder where nobody else's modules are found first.
        folders = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100 - keeps links
        environment |= {"PYTHONPATH": os.pathsep.join(folders)}
        # Both take address space: of every thread, and for threads that nobody needs.
        environment |= {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ppllava_runtime.sandbox_worker", str(its.fileno())]
        with its:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    env=environment,
                    cwd="/",
                )
            except OSError as error:
                self._control.close()
                raise SandboxError(
                    f"sandbox: the process that is to decode cannot be started ({error}): free "
                    "memory, or allow more processes"
                ) from error
        self._control.settimeout(_START_SECONDS)
        try:
            started = self._control.recv(len(READY)) == READY
        except OSError:
            started = False
        except BaseException:
            self.close()
            raise
        if not started:
            self.close()
            raise SandboxError(
                "sandbox: the process that is to decode did not start "
                f"(exit code {self._process.returncode}): its reason is above"
            )
        self._control.settimeout(_TAKING_SECONDS)

    @property
    def lives(self) -> bool:
        """Whether it can be told something."""
        return self._process.poll() is None

    def begin(self, job: Job, file: int) -> tuple[socket, socket]:
        """What a process that decodes `file` says, and how it ended; see `Run`.

        Raises:
            OSError: The zygote is dead.
            SandboxError: It is not, but there is no descriptor left to reach it by.
        """
        data, its_data = _wire(SOCK_STREAM)
        try:
            status, its_status = _wire(SOCK_SEQPACKET)
        except SandboxError:
            data.close()
            its_data.close()
            raise
        with its_data, its_status:
            try:
                descriptors = [its_data.fileno(), its_status.fileno(), file]
                send_fds(self._control, [packed(job)], descriptors)
            except BaseException:
                data.close()
                status.close()
                raise
        return data, status

    def close(self) -> None:
        """Ends it, and with it all that it forked."""
        self._control.close()
        try:
            self._process.wait(_TAKING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Run:
    """One process that decodes one file, as it is seen from outside.

    Args:
        limits: Which it was given.
        tally: Where its end is counted.
        what: "video clip.mp4", to begin a sentence with.
        leaving: Who waits for what it says.
        data: What it says.
        status: How it ended, which the zygote says; closing it ends the process.
    """

    def __init__(
        self,
        limits: MediaLimits,
        tally: Tally,
        what: str,
        leaving: Leaving,
        data: socket,
        status: socket,
    ) -> None:
        self._limits = limits
        self._tally = tally
        self._what = what
        self._leaving = leaving
        self._data = data
        self._status = status
        self._seconds_left = limits.wall_seconds
        self._buried = False

    @overload
    def take(self, one: type[One]) -> One: ...
    @overload
    def take(self, one: type[One], other: type[Other]) -> One | Other: ...
    def take(self, one: type[One], other: type[Other] | None = None) -> One | Other:
        """The next message, which must be of such a kind.

        Raises:
            MediaError: What is wrong with the file, or how it ended the process.
            SandboxError: The process is gone, and the file is not to blame.
            UsageError: What is wrong with what was asked.
        """
        length = int.from_bytes(self._exactly(LENGTH_BYTES), "big")
        if length > HEADER_BYTES:
            raise self.broken(f"it announced a message of {length} bytes")
        content = self._exactly(length)
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (one, other or one, Failed)}
        try:
            name, fields = loads(content.decode(), "message")
            message: One | Other | Failed = decode(kinds[name], fields, name)
        except (DataError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.broken("what it said cannot be understood") from error
        if isinstance(message, Failed):
            self.finish()
            failure = UsageError if message.asked_wrong else MediaError
            raise failure(plain(message.message))
        return message

    def pixels(self, height: int, width: int) -> Picture:
        """The picture (height,width,3) that was announced."""
        picture = np.empty((height, width, 3), np.uint8)
        self._fill(picture.data.cast("B"))
        return picture

    def broken(self, reason: str) -> MediaError:
        """What to raise when the process does what it never should."""
        self._tally.add(None, broken=True)
        return MediaError(f"{self._what}: it broke its decoder ({reason})")

    def finish(self) -> None:
        """Waits for the process to end, which it does now by itself."""
        if not self._buried:
            self._buried = True
            try:
                self._tally.add(self._ended(), broken=False)
            except TimeoutError:  # what it was to say, it has said
                self._tally.add(None, broken=True)

    def kill(self) -> None:
        """Ends the process soon, and now who waits for what it says; any thread may do so."""
        with suppress(OSError):  # they are closed, and the process has ended
            self._status.shutdown(SHUT_RDWR)
            self._data.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._status.close()
        self._data.close()

    def _exactly(self, length: int) -> bytearray:
        content = bytearray(length)
        self._fill(memoryview(content))
        return content

    def _fill(self, view: memoryview) -> None:
        while view:
            began = time.monotonic()
            self._data.settimeout(max(self._seconds_left, 1e-3))
            try:
                found = self._data.recv_into(view)
            except TimeoutError:
                raise self._slow() from None
            except ConnectionError:
                found = 0
            self._seconds_left -= time.monotonic() - began
            if found == 0:
                self._leaving.check()  # else it would be blamed for its end
                raise self._verdict()
            view = view[found:]

    def _slow(self) -> MediaError:
        self._tally.add(None, broken=True)
        return MediaError(
            f"{self._what}: decoding it takes more than {self._limits.wall_seconds:g} s: "
            "make it shorter or smaller"
        )

    def _verdict(self) -> MediaError | SandboxError:
        """Why a process ended without a word."""
        self._buried = True
        try:
            ended, limits = self._ended(), self._limits
        except TimeoutError:
            return self.broken("it says no more and does not end")
        if ended is None:
            self._leaving.check()  # who leaves while this waits ends it, too
            return SandboxError(
                f"{self._what}: the process that decodes it was ended from outside, or could not "
                "be made: try again"
            )
        self._tally.add(ended, broken=True)
        slow = ended.signal == signal.SIGXCPU or ended.cpu_seconds >= math.ceil(limits.cpu_seconds)
        if slow:
            return MediaError(
                f"{self._what}: decoding it takes more than {limits.cpu_seconds:g} s of a "
                "processor's time: make it shorter or smaller"
            )
        names = {known.value: known.name for known in signal.Signals}
        killed = names.get(ended.signal, f"signal {ended.signal}")
        reason = killed if ended.signal else f"exit code {ended.code}"
        return MediaError(f"{self._what}: it broke its decoder ({reason})")

    def _ended(self) -> Ended | None:
        """How it ended; None when there is nobody left to say it.

        Raises:
            TimeoutError: It has not ended.
        """
        self._status.settimeout(_END_SECONDS)
        try:
            content = self._status.recv(ENDED_BYTES)
        except TimeoutError:
            raise
        except OSError:
            return None
        return decode(Ended, json.loads(content), "end") if content else None


def _wire(kind: int) -> tuple[socket, socket]:
    """Both ends of one, ours first."""
    try:
        return socketpair(AF_UNIX, kind)
    except OSError as error:
        raise SandboxError(
            f"sandbox: nothing more can be decoded now ({error}): raise the limit of open files"
        ) from error


def plain(text: str) -> str:
    """A text from a process that is not trusted, on one line and of a bearable length."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MOST_TEXT])
