"""One export made many times over, while one of its system calls fails or is its last.

Importing torch and tracing a model take ten seconds, what is written takes tenths of one. So one
process imports and traces once, and each export is a fork of it that goes the whole way through the
real command; strace, attached to the fork, makes the N-th call of a kind fail with an error number
or kills the process at it. `python tests/under_fire.py` tries every fault at every call.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

Fault = Literal["KILL", "ENOSPC", "EIO"]
State = Literal["old", "new", "none", "half"]
FAULTS: tuple[Fault, ...] = ("KILL", "ENOSPC", "EIO")
# What fills, syncs and moves; what only makes room for it; and what only removes.
WRITES = ("write", "writev", "pwrite64", "pwritev", "copy_file_range", "sendfile", "ftruncate",
          "fallocate", "fsync", "fdatasync", "rename", "renameat", "renameat2")  # fmt: skip
OPENINGS = ("openat", "mkdir", "mkdirat")
REMOVALS = ("unlink", "unlinkat", "rmdir")
MAPPINGS = ("mmap",)
EXIT_STORAGE, TRIES = 74, 5
LAYERS = 14  # of the decoder, so that an export makes more than 150 calls of WRITES
_LINE = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<text>.*)")
_LAST_NAME = re.compile(r".*/(?:\.model\.onnx\.data\.\w+|([^/<>\"]+))[>\"]")


@dataclass(frozen=True)
class Call:
    """A system call that concerns a file beside or below the bundle.

    Attributes:
        name: The call's.
        number: Its place among the calls of this name, from 1; by it a fault is injected.
        text: Arguments and result, as strace shows them.
    """

    name: str
    number: int
    text: str

    @property
    def file(self) -> str:
        """The file's name, the same in every export."""
        last = _LAST_NAME.match(self.text)
        return re.sub(r"\.partial-\w+", ".partial", (last and last[1]) or "")

    def __str__(self) -> str:
        return f"{self.name} {self.number} ({self.file})"


@dataclass(frozen=True)
class Ended:
    """How an export ended.

    Attributes:
        code: The command's exit code; None when it was killed.
        stderr: What it said.
        calls: Those that concern files beside or below the bundle, in their order.
    """

    code: int | None
    stderr: str
    calls: tuple[Call, ...]


class Exporter:
    """Exports one checkpoint to any place, as often as wanted; made by `exporter`."""

    def __init__(self, folder: Path, address: Path, checkpoint: Path) -> None:
        self._folder = folder
        self._address = address
        self._checkpoint = checkpoint
        self._numbers = itertools.count()

    def __call__(self, out: Path, injections: Sequence[str] | None = None) -> Ended:
        """How an export to `out` ended, which replaces what is there.

        Args:
            out: The bundle.
            injections: strace's `inject` expressions; None runs without strace, which gives no
                calls.
        """
        number = next(self._numbers)
        stderr, log = self._folder / f"{number}.stderr", self._folder / f"{number}.log"
        arguments = [str(self._checkpoint), str(out), "--overwrite"]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._address))
            with connection.makefile("rw") as stream:
                print(json.dumps([arguments, str(stderr)]), file=stream, flush=True)
                process = stream.readline().strip()
                tracer = None if injections is None else _attach(process, log, injections)
                print("go", file=stream, flush=True)
                code = stream.readline().strip()
        if tracer is not None:
            tracer.communicate()
        calls = tuple(_read(log, out.parent)) if tracer else ()
        return Ended(int(code) if code else None, stderr.read_text(), calls)


@contextmanager
def exporter(checkpoint: Path) -> Iterator[Exporter]:
    """An Exporter of `checkpoint`, once all is imported and traced."""
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), Path(name, "socket")
        command = [sys.executable, __file__, "serve", str(checkpoint), str(address)]
        # One thread: a fork of a process with threads may hang.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        with server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "ready\n"
                yield Exporter(folder, address, checkpoint)
            finally:
                server.terminate()


def _attach(process: str, log: Path, injections: Sequence[str]) -> subprocess.Popen[str]:
    kinds = ",".join((*WRITES, *OPENINGS, *REMOVALS, *MAPPINGS))
    command = ["strace", "-f", "-y", "-s0", f"-o{log}", f"-etrace={kinds}", f"-p{process}"]
    command += [f"-einject={injection}" for injection in injections]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    assert "attached" in line, line
    return tracer


def _read(log: Path, home: Path) -> Iterator[Call]:
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        if match := _LINE.fullmatch(line):
            name, text = match["name"], match["text"]
            counts[match["thread"], name] += 1
            makes = name != "openat" or "O_CREAT" in text
            if str(home) in text and makes and "= -1 EEXIST" not in text:
                yield Call(name, counts[match["thread"], name], text)


@dataclass(frozen=True)
class Shot:
    """A fault at one call of an export.

    Attributes:
        at: The call, as `Range.calls` gives it.
        fault: KILL at the call, or its error number.
        over_old: Whether there is an old bundle.
        exchange: Whether the file system can swap two folders in one step.
    """

    at: Call
    fault: Fault
    over_old: bool = True
    exchange: bool = True

    def __str__(self) -> str:
        swap = "" if self.exchange else " without exchange"
        return (
            f"{self.fault} at {self.at} over {'an old bundle' if self.over_old else 'none'}{swap}"
        )

    def hit(self, ended: Ended) -> bool:
        """Whether the fault came at the call that was meant."""
        marks = ("= ?", "<unfinished ...>") if self.fault == "KILL" else ("(INJECTED)",)
        return any(
            (call.name, call.number, call.file) == (self.at.name, self.at.number, self.at.file)
            and call.text.endswith(marks)
            for call in ended.calls
        )

    @property
    def before(self) -> tuple[State, ...]:
        """What may be there when nothing new is: none between two renames that were cut short."""
        if not self.over_old:
            return ("none",)
        return ("old", "none") if self.fault == "KILL" and not self.exchange else ("old",)

    @property
    def codes(self) -> tuple[int | None, ...]:
        """The exit codes that are right."""
        if self.fault == "KILL":
            return (None,)
        # What cannot be removed is left to the next export; opening may be tried in another way.
        return (EXIT_STORAGE,) if self.at.name in WRITES else (0, EXIT_STORAGE)


@dataclass(frozen=True)
class Outcome:
    """What a fault did.

    Attributes:
        state: What is at the bundle's place.
        problems: Every way in which the promise was broken, a sentence each.
    """

    state: State
    problems: tuple[str, ...]


class Range:
    """Where exports are shot at: what is there before, and what must be there afterwards.

    Args:
        export: Makes them.
        folder: An empty one, to work in.
        old: The bundle that is there before.
    """

    def __init__(self, export: Exporter, folder: Path, old: Path) -> None:
        self._export = export
        self._folder = folder
        self._old = old
        self._numbers = itertools.count()
        home = self._home(over_old=False)
        assert export(home / "bundle").code == 0
        self._states: dict[State, dict[str, bytes | None]] = {
            "old": snapshot(old),
            "new": snapshot(home / "bundle"),
            "none": {},
        }

    def calls(self, *, over_old: bool, exchange: bool = True) -> list[Call]:
        """The calls of an export that nothing disturbs, in their order."""
        home = self._home(over_old)
        ended = self._export(home / "bundle", _injections(exchange))
        assert (ended.code, self._state(home / "bundle")) == (0, "new"), ended.stderr
        return list(ended.calls)

    def shoot(self, shot: Shot) -> Outcome:
        """What a shot did."""
        for _ in range(TRIES):
            home = self._home(shot.over_old)
            out = home / "bundle"
            ended = self._export(out, _injections(shot.exchange, shot))
            if shot.hit(ended):
                break
            # What libraries open is not always the same: the call may have another number now.
            calls = self.calls(over_old=shot.over_old, exchange=shot.exchange)
            _, _, nearest = min(
                (abs(call.number - shot.at.number), call.number, call)
                for call in calls
                if (call.name, call.file) == (shot.at.name, shot.at.file)
            )
            shot = replace(shot, at=nearest)
        state = self._state(out)
        left = [path.name for path in home.iterdir() if path != out]
        problems = list(_problems(shot, ended, state, left))
        if left or state == "new":  # else everything is as it was, and so is what comes next
            again = self._export(out)
            state_again, left = self._state(out), [path.name for path in home.iterdir()]
            if (again.code, state_again, left) != (0, "new", ["bundle"]):
                problems.append(f"again: {again.code}, {state_again}, {left}, {again.stderr!r}")
        shutil.rmtree(home.parent)
        return Outcome(state, tuple(f"{shot}: {problem}" for problem in problems))

    def volley(self, shots: Sequence[Shot]) -> list[Outcome]:
        """The outcome of each shot, as many at a time as there are cores."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.shoot, shots))

    def _home(self, over_old: bool) -> Path:
        home = self._folder / str(next(self._numbers)) / "home"
        home.mkdir(parents=True)
        if over_old:
            shutil.copytree(self._old, home / "bundle")
        return home

    def _state(self, out: Path) -> State:
        found = snapshot(out)
        return next((name for name, state in self._states.items() if found == state), "half")


def _injections(exchange: bool, shot: Shot | None = None) -> list[str]:
    injections = [] if exchange else ["renameat2:error=EINVAL"]
    if shot is not None:
        effect = "signal=KILL" if shot.fault == "KILL" else f"error={shot.fault}"
        injections.append(f"{shot.at.name}:{effect}:when={shot.at.number}")
    return injections


def _problems(shot: Shot, ended: Ended, state: State, left: list[str]) -> Iterator[str]:
    if not shot.hit(ended):
        yield "it hit something else"
    if ended.code not in shot.codes:
        yield f"the command ended with {ended.code}, expected {shot.codes}, and said {ended.stderr}"
    if ended.code and (ended.stderr.count("\n"), ended.stderr[:7]) != (1, "error: "):
        yield f"it said {ended.stderr!r}, expected one sentence"
    allowed: tuple[State, ...] = ("new",) if ended.code == 0 else (*shot.before, "new")
    if state not in allowed:
        yield f"{state} is there after exit code {ended.code}"
    if left and shot.fault != "KILL" and shot.at.name not in REMOVALS:
        yield f"{', '.join(left)} is left"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The content of every file below `folder` by its path, None for a folder; {} without it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in [folder, *folder.rglob("*")]
        if path.exists()
    }


def _serve(checkpoint: str, address: str) -> None:
    """Traces the checkpoint's graphs once, then forks an export per connection."""
    import torch

    from ppllava_engines.errors import run_command
    from ppllava_export.cli import main

    trace = torch.onnx.export
    traced: dict[tuple[str, ...], Any] = {}

    def export(*args: Any, input_names: Sequence[str], **options: Any) -> Any:
        key = tuple(input_names)
        if key not in traced:
            program = trace(*args, input_names=input_names, **options)
            assert program is not None  # only the old exporter returns nothing
            traced[key] = program.model
        return SimpleNamespace(model=traced[key].clone())

    torch.onnx.export = export  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        code = run_command(main, [checkpoint, str(Path(folder, "bundle"))])
        assert code == 0, code

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            arguments, log = json.loads(self.rfile.readline())
            output = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(output, 2)
            self.wfile.write(b"%d\n" % os.getpid())
            if self.rfile.readline():
                self.wfile.write(b"%d\n" % run_command(main, arguments))
            os._exit(0)

    class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
        pass

    with Server(address, Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


def _sweep() -> bool:
    """Whether any promise was broken by any fault at any call."""
    from tiny_bundle import write_bundle
    from tiny_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "source", text_config={"num_hidden_layers": LAYERS})
        (folder / "range").mkdir()
        with exporter(checkpoint) as export:
            field = Range(export, folder / "range", write_bundle(folder / "old"))
            shots = [
                Shot(call, fault, over_old, exchange)
                for over_old, exchange in ((True, True), (True, False), (False, True))
                for call in field.calls(over_old=over_old, exchange=exchange)
                for fault in FAULTS
                if call.name not in MAPPINGS and (exchange or "rename" in call.name)
            ]
            outcomes = field.volley(shots)
    table = Counter(
        (shot.at.name, shot.fault, outcome.state)
        for shot, outcome in zip(shots, outcomes, strict=True)
    )
    for (kind, fault, state), count in sorted(table.items()):
        print(f"{kind:10} {fault:7} {state:5} {count:5}")
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    print(*problems, f"{len(shots)} shots, {len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(*sys.argv[2:])
    else:
        sys.exit(_sweep())
