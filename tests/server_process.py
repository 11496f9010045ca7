"""The real ppllava-serve in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
from httpx2._config import DEFAULT_TIMEOUT_CONFIG

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("engines", "runtime"))
START_SECONDS = 60.0
SERVE = "import sys; from ppllava_runtime.server.cli import run; sys.exit(run())"


# Any process of a test may stand still for longer than the 5 s that clients wait by themselves.
for _part in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _part, START_SECONDS)


@dataclass
class Served:
    """A server that is ready.

    Attributes:
        url: Of its root, without a slash at the end.
        port: It listens on 127.0.0.1.
        process: It; one may send it signals.
        log: What it writes to stderr.
        memory: The line of stdout on memory.
        model: The name a request has to give.
    """

    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path
    memory: str
    model: str

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        """Its exit code after the signal."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout)

    def rss_bytes(self) -> int:
        """Its resident memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


class Serve(Protocol):
    """Starts a server with flags; it ends with the test."""

    def __call__(
        self, *flags: object, env: dict[str, str] | None = None, key: str = ""
    ) -> Served: ...


def start(
    bundle: Path, log: Path, *flags: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The process, at once: nothing is known of it yet."""
    arguments = [sys.executable, "-W", "error", "-c", SERVE, bundle, "--port", 0, *flags]
    with log.open("w") as stderr:
        return subprocess.Popen(
            [str(argument) for argument in arguments],
            env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def ended(process: subprocess.Popen[str], timeout: float = START_SECONDS) -> int:
    """The exit code of a process that ends by itself, or is killed when it takes too long."""
    with process:
        try:
            return process.wait(timeout)
        finally:
            process.kill()


@contextmanager
def served(
    bundle: Path, folder: Path, *flags: object, env: dict[str, str] | None = None, key: str = ""
) -> Iterator[Served]:
    """A server on the bundle, ready, with its spool and its log in `folder`; ended at the end."""
    log = folder / "server.log"
    process = start(bundle, log, "--spool", folder / "spool", "--threads", 1, *flags, env=env)
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline().split()
        assert first[:2] == ["listening", "on"], (first, log.read_text())
        memory = process.stdout.readline().strip()
        watchdog.cancel()
        url = first[2]
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer: dict[str, Any] = httpx2.get(f"{url}/v1/models", headers=headers).json()
        port = int(url.rpartition(":")[2])
        yield Served(url, port, process, log, memory, answer["data"][0]["id"])
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
