"""A stand-in for `cuda.bindings.runtime` on the CPU's memory, as strict as CUDA and as lazy.

What is asked of a stream is done when something waits for it, and not before: who forgets to wait
reads what was there before. What CUDA forbids is refused with CUDA's own errors, and what it merely
does not survive (a freed address, bytes beyond a buffer) ends the test. Every name and argument is
compared with the real module's in tests/tensorrt/test_rung6_bindings.py.

It tests the order of calls and their arguments; nothing about a GPU is shown by it.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

_ALIGNMENT = 256


class Stray(BaseException):
    """An address that a GPU would not survive; no code may handle it."""


class Error(IntEnum):
    """Those of CUDA's errors that come up here."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class CopyKind(IntEnum):
    """In which direction; by default CUDA finds out."""

    cudaMemcpyDefault = 4


class CaptureMode(IntEnum):
    """Whom a capture forbids what."""

    cudaStreamCaptureModeThreadLocal = 1


Result = tuple[Any, ...]
Work = Callable[[], None]
_GOOD = Error.cudaSuccess


class CudaDouble:
    """The module.

    Attributes:
        total: Bytes of the GPU's memory.
        integrated: Whether it is the CPU's, too.
        fails: Function → the error it gives from now on.
        calls: How often each function was called.
        work_fails: What waiting for the stream gives; it stays, as on a GPU.
    """

    cudaError_t = Error
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode
    cudaStreamNonBlocking = 1
    cudaHostAllocMapped = 2

    def __init__(self, total: int = 1 << 30, integrated: bool = False) -> None:
        self.total = total
        self.integrated = integrated
        self.fails: dict[str, Error] = {}
        self.calls: Counter[str] = Counter()
        self.work_fails = _GOOD
        self._memory: dict[int, tuple[np.ndarray[Any, Any], int, str]] = {}
        self._freed: list[tuple[np.ndarray[Any, Any], int, int]] = []
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._capture_broken = False
        self._graphs: dict[int, list[Work]] = {}
        self._streams: set[int] = set()
        self._handles = 100

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name in self.fails:
                return (self.fails[name], None)
            return found(*arguments)

        return counted

    # What the test double of TensorRT, and tests, ask.

    @property
    def used(self) -> int:
        """Bytes of the GPU's memory that are allocated."""
        return sum(size for _, size, kind in self._memory.values() if kind == "device")

    @property
    def num_allocations(self) -> int:
        """Allocations of both kinds so far."""
        return self.calls["cudaMalloc"] + self.calls["cudaHostAlloc"]

    @property
    def is_capturing(self) -> bool:
        """Whether work is written down instead of done."""
        return self._captured is not None

    def enqueue(self, work: Work, stream: int) -> None:
        """Does the work when something waits for it, or writes it down in a capture."""
        assert stream in self._streams
        (self._queue if self._captured is None else self._captured).append(work)

    def view(self, pointer: int, size: int, *, mapped: bool = True) -> np.ndarray[Any, Any]:
        """The bytes at an address that the GPU may use."""
        for start, (array, bytes_, kind) in self._memory.items():
            if start <= pointer < start + max(bytes_, 1):
                if pointer + size > start + bytes_:
                    raise Stray(f"{size} bytes at {pointer - start} of a buffer of {bytes_}")
                if kind == "host" and not mapped:
                    raise Stray("memory of the CPU, where the GPU's is expected")
                offset = pointer - array.ctypes.data
                return array[offset : offset + size]
        raise Stray("an address that is in no buffer")

    # The module's functions.

    def cudaGetDeviceCount(self) -> Result:
        return _GOOD, 1

    def cudaGetDeviceProperties(self, device: int) -> Result:
        assert device == 0
        properties = SimpleNamespace(
            name=b"Double",
            major=8,
            minor=7,
            integrated=int(self.integrated),
            totalGlobalMem=self.total,
        )
        return _GOOD, properties

    def cudaGetErrorName(self, error: Error) -> Result:
        return _GOOD, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> Result:
        assert error in Error
        return _GOOD, b"as the double was told"

    def cudaGetLastError(self) -> Result:
        return (_GOOD,)

    def cudaMemGetInfo(self) -> Result:
        return _GOOD, self.total - self.used, self.total

    def cudaStreamCreateWithFlags(self, flags: int) -> Result:
        assert flags == self.cudaStreamNonBlocking
        stream = self._handle()
        self._streams.add(stream)
        return _GOOD, stream

    def cudaStreamDestroy(self, stream: int) -> Result:
        self._drain()
        self._streams.remove(stream)
        return (_GOOD,)

    def cudaStreamSynchronize(self, stream: int) -> Result:
        assert stream in self._streams
        if self._captured is not None:
            self._capture_broken = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._drain()
        return (self.work_fails,)

    def cudaMalloc(self, size: int) -> Result:
        return self._allocate(size, "device")

    def cudaHostAlloc(self, size: int, flags: int) -> Result:
        assert flags == self.cudaHostAllocMapped
        return self._allocate(size, "host")

    def cudaHostGetDevicePointer(self, pHost: int, flags: int) -> Result:
        assert flags == 0
        self.view(pHost, 1)
        return _GOOD, pHost

    def cudaFree(self, devPtr: int) -> Result:
        return self._free(devPtr, "device")

    def cudaFreeHost(self, ptr: int) -> Result:
        return self._free(ptr, "host")

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: CopyKind, stream: int
    ) -> Result:
        return self.cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: CopyKind,
        stream: int,
    ) -> Result:
        if width > dpitch or width > spitch:
            return (Error.cudaErrorInvalidValue,)

        def copy() -> None:
            for row in range(height):
                self._any(dst + row * dpitch, width)[:] = self._any(src + row * spitch, width)

        assert kind is CopyKind.cudaMemcpyDefault
        self.enqueue(copy, stream)
        return (_GOOD,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Result:
        self.enqueue(lambda: self.view(devPtr, count).fill(value), stream)
        return (_GOOD,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> Result:
        assert stream in self._streams
        assert mode is CaptureMode.cudaStreamCaptureModeThreadLocal
        assert self._captured is None
        self._captured, self._capture_broken = [], False
        return (_GOOD,)

    def cudaStreamEndCapture(self, stream: int) -> Result:
        assert stream in self._streams
        assert self._captured is not None
        work, self._captured = self._captured, None
        if self._capture_broken:
            return Error.cudaErrorStreamCaptureInvalidated, None
        handle = self._handle()
        self._graphs[handle] = work
        return _GOOD, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Result:
        assert flags == 0
        handle = self._handle()
        self._graphs[handle] = list(self._graphs[graph])
        return _GOOD, handle

    def cudaGraphDestroy(self, graph: int) -> Result:
        del self._graphs[graph]
        return (_GOOD,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> Result:
        for work in self._graphs[graphExec]:
            self.enqueue(work, stream)
        return (_GOOD,)

    def cudaGraphExecDestroy(self, graphExec: int) -> Result:
        self._drain()
        del self._graphs[graphExec]
        return (_GOOD,)

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def _allocate(self, size: int, kind: str) -> Result:
        if self._captured is not None:
            self._capture_broken = True
            return Error.cudaErrorStreamCaptureUnsupported, None
        if kind == "device" and self.used + size > self.total:
            return Error.cudaErrorMemoryAllocation, None
        # Filled with what makes NaN of floats of any width: memory is not zero.
        array = np.full(size + _ALIGNMENT, 0xFF, np.uint8)
        pointer = -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._memory[pointer] = (array, size, kind)
        return _GOOD, pointer

    def _free(self, pointer: int, kind: str) -> Result:
        if self._captured is not None:
            self._capture_broken = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._drain()
        array, size, found = self._memory.pop(pointer)
        assert found == kind
        self._freed.append((array, pointer, size))  # so that nothing else gets this address
        return (_GOOD,)

    def _any(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        """The bytes at an address of anyone's: CUDA copies to and from any memory of the CPU."""
        if any(start <= pointer < start + max(count, 1) for _, start, count in self._freed):
            raise Stray("an address that was freed")
        if any(start <= pointer < start + max(count, 1)
               for start, (_, count, _) in self._memory.items()):  # fmt: skip
            return self.view(pointer, size)
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(pointer))
