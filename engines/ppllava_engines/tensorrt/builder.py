"""One ONNX file → one plan, by TensorRT or TensorRT-RTX in a process of its own.

A builder keeps the memory it took, and a plugin or an exhausted GPU may end the process it runs in:
one process per plan bounds the memory on a small board to that of the largest graph, and leaves an
error to be told.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ppllava_engines import strict_json
from ppllava_engines.errors import (
    InternalError,
    PPLLaVAError,
    StorageError,
    UnavailableError,
)
from ppllava_engines.tensorrt.plans import Library, Options
from ppllava_engines.tensorrt.profiles import Profile

PIP = {
    "tensorrt": "pip install tensorrt (on a Jetson: apt install python3-libnvinfer)",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
}
_PR_SET_PDEATHSIG = 1
_MEMORY_MARKS = ("out of memory", "outofmemory", "insufficient workspace")
_MOST_SAID = 300  # characters of what TensorRT said in an error


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to build.

    Attributes:
        library: By which of the two.
        graph: Its name, for errors.
        onnx: The lowered graph's file.
        out: The plan to write.
        profiles: See `Profile`.
        options: Where the plan shall run.
        workspace_bytes: Most scratch memory of one layer of the plan; None is all of the GPU's.
        tactic_bytes: Most memory of a kernel that is being tried; None is all of the GPU's.
        timing_cache: File of measured kernels, read and written; None without, always on RTX.
        plugin: The library of our plugin; None where the graph calls none.
    """

    library: Library
    graph: str
    onnx: str
    out: str
    profiles: tuple[Profile, ...]
    options: Options
    workspace_bytes: int | None
    tactic_bytes: int | None
    timing_cache: str | None
    plugin: str | None


@dataclass(frozen=True)
class Built:
    """What a build took: seconds, and the most memory of its process in bytes."""

    seconds: float
    peak_bytes: int


def library_version(library: Library) -> str:
    """The version of an installed TensorRT.

    Raises:
        UnavailableError: It is not installed, or does not load.
    """
    version: str = import_library(library).__version__
    return version


def is_installed(library: Library) -> bool:
    """Whether the module is there, without loading it."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None  # else a folder of that name


def build_plan(request: Request, progress: Callable[[str], None] | None = None) -> Built:
    """Writes the plan, and returns what that took.

    Args:
        request: What to build.
        progress: Called with what TensorRT is at, a few times a second at most.

    Raises:
        IncompatibleError: TensorRT does not take the graph: names the node and what it said.
        InternalError: It ended in a way that it does not explain.
        StorageError: The plan could not be written.
        UnavailableError: TensorRT, the GPU or memory is missing.
    """
    paths = [path for path in sys.path if path]
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        ) as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError), child.stdin as stream:  # how it ended tells more
                stream.write(strict_json.dumps(request).encode())
            result: dict[str, Any] = {}
            for line in child.stdout:
                message = json.loads(line)
                if "at" not in message:
                    result = message
                elif progress:
                    progress(message["at"])
            code = child.wait()
        finally:
            child.kill()
        if code == 0 and "seconds" in result:
            return Built(result["seconds"], result["peak_bytes"])
        if "error" in result:
            raise _error_class(result["exit_code"])(result["error"])
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
        raise _crash(request, code, said.read().decode(errors="replace"))


def serve() -> None:
    """The child's side of `build_plan`: a request from stdin, progress and outcome to stdout."""
    from ppllava_engines.tensorrt.compiler import compile_plan

    # It must not outlive the command that was killed: it would go on for minutes, for nobody.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries may print: what they say goes to stderr, and the answers to where stdout was.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)

        def answer(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=answers, flush=True)

        try:
            value = strict_json.loads(sys.stdin.read(), "request")
            request = strict_json.decode(Request, value, "request")
            started = time.monotonic()
            compile_plan(request, lambda phase: answer({"at": phase}))
            # Kilobytes on Linux.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer({"seconds": time.monotonic() - started, "peak_bytes": peak})
        except PPLLaVAError as error:
            answer({"error": str(error), "exit_code": error.exit_code})
        except OSError as error:
            answer({"error": f"plan: {error}", "exit_code": StorageError.exit_code})


def import_library(library: Library) -> Any:
    """The module itself.

    Raises:
        UnavailableError: It is not installed, or does not load.
    """
    try:
        return importlib.import_module(library)
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{library} cannot be loaded ({error}): {PIP[library]}") from error


def _error_class(exit_code: int) -> type[PPLLaVAError]:
    classes = {kind.exit_code: kind for kind in PPLLaVAError.__subclasses__()}
    return classes.get(exit_code, InternalError)


def _crash(request: Request, code: int, said: str) -> PPLLaVAError:
    if code == -signal.SIGKILL:
        return out_of_memory(request.graph)
    lines = [line for line in said.splitlines() if line.strip()]
    last = f": {shortened(lines[-1])}" if lines else ""
    what = f"signal {-code}" if code < 0 else f"exit code {code}"
    return InternalError(
        f"plan {request.graph}: {request.library} ended by {what}{last}: please report it"
    )


def is_out_of_memory(said: Iterable[str]) -> bool:
    """Whether one of the things that TensorRT said is that memory was used up."""
    return any(mark in text.lower() for text in said for mark in _MEMORY_MARKS)


def out_of_memory(graph: str) -> UnavailableError:
    """What is raised where a build ran out of memory."""
    return UnavailableError(
        f"plan {graph}: the memory was used up: close other programs, add swap, or build for less "
        "with --frames, --max-tokens and --workspace"
    )


def shortened(text: str) -> str:
    """What a library said, on one line and cut to what fits into a sentence."""
    text = " ".join(text.split())
    return text if len(text) <= _MOST_SAID else f"{text[: _MOST_SAID - 1]}…"
