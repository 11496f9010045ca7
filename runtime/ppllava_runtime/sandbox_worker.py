"""The processes of a sandbox: one that waits, and one that it forks for every file.

The first (the zygote) has one thread, has loaded all that decoding needs, and never looks at a file
itself. Those that do can open nothing, and end with it.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import math
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ppllava_engines.errors import InternalError, PPLLaVAError, UsageError
from ppllava_engines.strict_json import decode
from ppllava_runtime import seccomp
from ppllava_runtime.guard import Guard
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.memory import thumbnails
from ppllava_runtime.pictures import read_picture
from ppllava_runtime.preprocess import squared
from ppllava_runtime.sandbox_wire import (
    DATA,
    FILE,
    JOB_BYTES,
    NUM_DESCRIPTORS,
    READY,
    Done,
    Ended,
    Failed,
    Frame,
    Job,
    Still,
    packed,
    send,
)
from ppllava_runtime.video import ChosenFrames

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_NOBODY = 65534
_NUM_SENT = 3  # descriptors with a job: those of `Run`, and the file


def main() -> NoReturn:
    """Forks what it is told to, until nobody is there to tell."""
    # They are for the process that started this, which may still have files to decode.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _load()
    zygote = _Zygote(socket.socket(fileno=int(sys.argv[1])))
    gc.collect()
    gc.freeze()  # so that forks share what is there
    zygote.run()


def _load() -> None:
    """Loads what packages load when it is first used: too late in a fork, which opens no file."""
    Image.init()
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):
                importlib.import_module(module.name)


@dataclass(frozen=True)
class _Fork:
    """A process that decodes.

    Attributes:
        pid: Its number.
        handle: Readable when it has ended.
        status: Told how it ended; who closes the other end wants it to.
    """

    pid: int
    handle: int
    status: socket.socket


class _Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._forks: dict[int, _Fork] = {}  # by both of their descriptors
        self._poll = select.poll()
        self._num_forked = 0
        self._pid = os.getpid()
        self._prctl = ctypes.CDLL(None).prctl
        # What a fork leaves behind is this process's child from then on, see `_sweep`.
        self._prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # All where a fork's are to lie, so that none of those that come has to make room there.
        while (nothing := os.open(os.devnull, os.O_RDWR)) < NUM_DESCRIPTORS:
            pass
        self._nothing = nothing
        self._filters = seccomp.available()
        if not self._filters:
            print(
                "sandbox: this system knows no seccomp filter: a file that takes over the process "
                "which decodes it is held by its user and its limits alone",
                file=sys.stderr,
            )

    def run(self) -> NoReturn:
        """Never returns; what it forked ends with it."""
        self._poll.register(self._control, select.POLLIN)
        self._control.send(READY)
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            for descriptor in ready:
                if fork := self._forks.get(descriptor):
                    if descriptor == fork.handle:
                        self._bury(fork)
                    else:
                        os.kill(fork.pid, signal.SIGKILL)
                        self._poll.unregister(descriptor)
            # Last, as it opens descriptors, whose numbers may be of those just closed.
            if self._control.fileno() in ready:
                self._take_job()

    def _take_job(self) -> None:
        content, descriptors, _, _ = socket.recv_fds(self._control, JOB_BYTES, _NUM_SENT)
        if not content:
            self._end()
        try:
            # The kernel drops those for which there is no room.
            if len(descriptors) < _NUM_SENT:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            data, status, file = descriptors
            self._fork(decode(Job, json.loads(content), "job"), data, status, file)
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            _complain(error)

    def _fork(self, job: Job, data: int, status: int, file: int) -> None:
        """Takes the descriptors, unless it raises OSError: then nothing was forked."""
        self._num_forked += 1
        pid = os.fork()
        if pid == 0:
            try:
                self._enter(data, status, file, job.limits)
                _work(job)
            finally:
                os._exit(1)
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        os.close(data)
        os.close(file)
        fork = _Fork(pid, handle, socket.socket(fileno=status))
        self._forks |= {handle: fork, status: fork}
        self._poll.register(handle, select.POLLIN)
        self._poll.register(status, select.POLLIN)  # and hanging up, which always counts

    def _bury(self, fork: _Fork) -> None:
        _, status, usage = os.wait4(fork.pid, 0)
        ended = Ended(
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            peak_bytes=usage.ru_maxrss * 1024,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
        )
        del self._forks[fork.handle], self._forks[fork.status.fileno()]
        self._sweep()
        with suppress(OSError):  # of those that were told to end nobody wants to know
            fork.status.send(packed(ended))
        for descriptor in (fork.handle, fork.status.fileno()):
            with suppress(KeyError):
                self._poll.unregister(descriptor)
        os.close(fork.handle)
        fork.status.close()

    def _sweep(self) -> None:
        """Ends whatever descends from forks that have ended, where no filter kept them from it."""
        children = Path(f"/proc/self/task/{self._pid}/children")
        known = {fork.pid for fork in self._forks.values()}
        with suppress(OSError):  # of a kernel that does not tell
            while left := {int(pid) for pid in children.read_text().split()} - known:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def _end(self) -> NoReturn:
        for pid in {fork.pid for fork in self._forks.values()}:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._forks.clear()
        self._sweep()
        os._exit(0)

    def _enter(self, data: int, status: int, file: int, limits: MediaLimits) -> None:
        """Makes this fork the one that decodes: from here on there is no way back."""
        told = socket.socket(fileno=status)
        try:
            self._restrict(data, file, {status, self._nothing}, limits)
        except BaseException as error:
            _complain(error)
            told.shutdown(socket.SHUT_RDWR)  # so that nobody says that the file did this
            raise
        for descriptor in (0, 1, 2):
            os.dup2(self._nothing, descriptor)
        os.close(self._nothing)
        told.close()

    def _restrict(self, data: int, file: int, kept: set[int], limits: MediaLimits) -> None:
        """Takes from this fork what it does not need, besides the descriptors `kept`."""
        # FFmpeg makes as many threads as there are cores to scale a picture, and each takes its
        # share of the address space.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[self._num_forked % len(cores)]})
        os.dup2(data, DATA)
        os.dup2(file, FILE)
        for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            if descriptor >= NUM_DESCRIPTORS and descriptor not in kept:
                with suppress(OSError):  # that by which the folder was read
                    os.close(descriptor)
        seconds = math.ceil(limits.cpu_seconds)
        for kind, soft, hard in (
            (resource.RLIMIT_AS, limits.address_space, limits.address_space),
            (resource.RLIMIT_CPU, seconds, seconds + 1),
            (resource.RLIMIT_FSIZE, 0, 0),
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_NOFILE, NUM_DESCRIPTORS, NUM_DESCRIPTORS),
        ):
            resource.setrlimit(kind, (soft, hard))
        if os.geteuid() == 0:
            with suppress(OSError):  # where there are no such users
                os.setgroups(())
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        if self._prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError("it might gain rights: expected Linux 3.5 or later")
        # After all that, as another user would have to say it again.
        if self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != self._pid:
            raise OSError("it would survive what made it: is that gone?")
        if self._filters:
            seccomp.install()


def _complain(error: BaseException) -> None:
    """Tells who runs all this; who asked learns of it as nobody has its descriptors any more."""
    with suppress(OSError):
        print(f"sandbox: a file cannot be decoded: {error}", file=sys.stderr, flush=True)


def _work(job: Job) -> NoReturn:
    """Decodes one file and ends."""
    wire = socket.socket(fileno=DATA)
    guard = Guard(FILE, job.limits)
    kind = {"still": "image", "clip": "video"}[job.task]
    try:
        if job.task == "still":
            _send_still(wire, Path(job.path), guard)
        else:
            _send_clip(wire, job, guard)
    except UsageError as error:
        failed = Failed(str(error), asked_wrong=True)
    except InternalError as error:  # whatever it is, the file is to blame
        failed = Failed(f"{kind} {job.path}: it broke its decoder ({error})")
    except PPLLaVAError as error:
        failed = Failed(str(error))
    except MemoryError:
        most = job.limits.address_space >> 20
        failed = Failed(
            f"{kind} {job.path}: decoding it takes more than {most} MiB of memory: make it smaller"
        )
    except (BrokenPipeError, ConnectionResetError):  # nobody reads any more
        os._exit(1)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        failed = Failed(f"{kind} {job.path}: it broke its decoder ({reason})")
    else:
        os._exit(0)
    with suppress(OSError):
        send(wire, failed)
    os._exit(0)


def _send_still(wire: socket.socket, path: Path, guard: Guard) -> None:
    found = read_picture(path, guard)
    if found is None:
        send(wire, Still(0, 0, None))
        return
    picture, note = found
    height, width, _ = picture.shape
    send(wire, Still(height, width, note), _bytes(picture))


def _send_clip(wire: socket.socket, job: Job, guard: Guard) -> None:
    chosen = ChosenFrames(Path(job.path), job.sample, alone=False, guard=guard)
    for rows, frame in chosen:
        (thumbnail,) = thumbnails([frame])
        height, width, _ = thumbnail.shape
        message = Frame(tuple(rows), chosen.num_rows, height, width)
        send(wire, message, _bytes(squared(frame, job.size)), _bytes(thumbnail))
    info = chosen.info
    send(
        wire,
        Done(
            timestamps=tuple(float(second) for second in info.timestamps),
            indices=tuple(int(place) for place in info.indices),
            num_frames=int(info.num_frames),
            num_decoded=int(info.num_decoded),
            fps=float(info.fps),
            damage=info.damage,
        ),
    )


def _bytes(pixels: NDArray[np.uint8]) -> memoryview:
    return np.ascontiguousarray(pixels).data.cast("B")


if __name__ == "__main__":
    main()
