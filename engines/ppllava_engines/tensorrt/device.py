"""CUDA as the TensorRT backend needs it: a GPU, a stream, memory, and graphs of what was launched.

Everything is freed when the last thing that uses it goes.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ppllava_engines.errors import InternalError, UnavailableError

ALIGNMENT = 256  # bytes; TensorRT takes no other addresses, and CUDA allocates at none


class Device:
    """This process's GPU (CUDA_VISIBLE_DEVICES chooses which) and one stream on it.

    What is asked of one device happens in the order in which it was asked, and later: only
    `synchronize` waits for it.

    Attributes:
        name: As the driver calls it.
        compute_capability: (major, minor).
        integrated: Whether GPU and CPU share their memory.
        memory_bytes: All of the GPU's memory.

    Raises:
        InternalError: CUDA failed.
        UnavailableError: No GPU, no driver for it, or no cuda-bindings.
    """

    def __init__(self) -> None:
        self._cuda = _runtime()
        _require_gpu(self._cuda)
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.compute_capability: tuple[int, int] = (properties.major, properties.minor)
        self.integrated = bool(properties.integrated)
        self.memory_bytes = int(properties.totalGlobalMem)
        # One that does not wait for the default stream, on which others in this process may work.
        stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._stream = stream
        self._free = weakref.finalize(self, self._cuda.cudaStreamDestroy, stream)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, num_bytes: int, what: str) -> Buffer:
        """Memory of the GPU, whose content is arbitrary.

        Args:
            num_bytes: Its size.
            what: What it is for, for people.

        Raises:
            UnavailableError: There is not so much left.
        """
        return Buffer(self, self._allocated("cudaMalloc", what, num_bytes), num_bytes)

    def allocate_host(self, num_bytes: int, what: str) -> HostBuffer:
        """Memory of the CPU that the GPU copies from and to by itself, or uses in place.

        Args:
            num_bytes: Its size.
            what: What it is for, for people.

        Raises:
            UnavailableError: There is not so much left.
        """
        flags = self._cuda.cudaHostAllocMapped
        pointer = self._allocated("cudaHostAlloc", what, num_bytes, flags)
        return HostBuffer(self, pointer, num_bytes)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copies between any two addresses, later."""
        # CUDA knows whose memory an address is.
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, self._stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        num_rows: int,
    ) -> None:
        """Copies rows of `width` bytes that are so many bytes apart in each place, later."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        rows = (target, target_pitch, source, source_pitch, width, num_rows)
        self._call("cudaMemcpy2DAsync", *rows, kind, self._stream)

    def clear(self, target: int, num_bytes: int) -> None:
        """Sets bytes to zero, later."""
        self._call("cudaMemsetAsync", target, 0, num_bytes, self._stream)

    def synchronize(self) -> None:
        """Waits for all that was asked of this device.

        Raises:
            InternalError: Some of it failed.
        """
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, launch: Callable[[], None]) -> LaunchGraph | None:
        """What `launch` asks of this device, to be asked again at once; it is not done now.

        None when it asks for what cannot be captured.
        """
        # Other threads may allocate meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        done = False
        try:
            launch()
            done = True
        except InternalError:
            pass
        finally:  # Ctrl-C too must not leave a stream that only records
            error, graph = self._cuda.cudaStreamEndCapture(self._stream)
            captured = error == self._cuda.cudaError_t.cudaSuccess
            if not captured:
                self._cuda.cudaGetLastError()  # or a later call would report it as its own
            elif not done:
                self._call("cudaGraphDestroy", graph)
        if not (captured and done):
            return None
        try:
            return LaunchGraph(self, self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def _allocated(self, function: str, what: str, num_bytes: int, *flags: int) -> int:
        error, *pointers = getattr(self._cuda, function)(max(num_bytes, 1), *flags)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()
            free, _ = self._call("cudaMemGetInfo")
            raise UnavailableError(
                f"GPU {self.name}: {num_bytes / 1e6:.0f} MB for {what} are not free, "
                f"{free / 1e6:.0f} of {self.memory_bytes / 1e6:.0f} MB are "
                "(cudaErrorMemoryAllocation): end other programs, or run ppllava-build for fewer "
                "frames or tokens"
            )
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise _failure(self._cuda, function, error)
        return int(pointers[0])

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a CUDA function gives back beside its error."""
        error, *values = getattr(self._cuda, function)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise _failure(self._cuda, function, error)
        return values[0] if len(values) == 1 else tuple(values)


class Buffer:
    """Memory of a GPU.

    Attributes:
        device: Whose.
        pointer: Its first byte, aligned to `ALIGNMENT`.
        num_bytes: Its size.
    """

    def __init__(self, device: Device, pointer: int, num_bytes: int) -> None:
        self.device = device
        self.pointer = pointer
        self.num_bytes = num_bytes
        self._free = weakref.finalize(self, device._cuda.cudaFree, pointer)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0) -> DeviceArray:
        """An array in this memory, from byte `offset` on."""
        found = DeviceArray(shape, np.dtype(dtype), self.pointer + offset, self)
        if offset + found.nbytes > self.num_bytes:
            raise InternalError(
                f"a buffer of {self.num_bytes} bytes has no room for {found.nbytes} from {offset} "
                "on"
            )
        return found


class HostBuffer:
    """Memory of the CPU that the GPU reaches.

    Attributes:
        pointer: Its first byte, for the CPU.
        device_pointer: The same byte for the GPU. Through it nothing need be copied, but nothing is
            cached either: for what is read or written once, where both share their memory.
        num_bytes: Its size.
    """

    def __init__(self, device: Device, pointer: int, num_bytes: int) -> None:
        self.pointer = pointer
        self.num_bytes = num_bytes
        self._free = weakref.finalize(self, device._cuda.cudaFreeHost, pointer)
        self.device_pointer = int(device._call("cudaHostGetDevicePointer", pointer, 0))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array at the beginning of this memory, to be used no longer than the buffer."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self.num_bytes:
            raise InternalError(f"a buffer of {self.num_bytes} bytes has no room for {size}")
        content = (ctypes.c_ubyte * size).from_address(self.pointer)
        array: NDArray[Any] = np.ctypeslib.as_array(content).view(dtype).reshape(shape)
        return array


class Mirror:
    """Memory that the CPU fills for the GPU, or the GPU for the CPU.

    It is there twice and copied, but once and in place where both share their memory.

    Attributes:
        host: What the CPU sees.
        address: What the GPU sees.
        num_bytes: The size of either.

    Args:
        device: Whose.
        num_bytes: The same.
        what: What it is for, for people.

    Raises:
        UnavailableError: There is not so much left.
    """

    def __init__(self, device: Device, num_bytes: int, what: str) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self._buffer = None if device.integrated else device.allocate(num_bytes, what)
        self.host = device.allocate_host(num_bytes, what)
        self.address = self._buffer.pointer if self._buffer else self.host.device_pointer

    def upload(self, num_bytes: int | None = None) -> None:
        """Lets the GPU see what the CPU wrote, later; None is all of it."""
        if self._buffer:
            size = self.num_bytes if num_bytes is None else num_bytes
            self._device.copy(self.address, self.host.pointer, size)

    def download(self, num_bytes: int | None = None) -> None:
        """Lets the CPU see what the GPU wrote, later; None is all of it."""
        if self._buffer:
            size = self.num_bytes if num_bytes is None else num_bytes
            self._device.copy(self.host.pointer, self.address, size)


class LaunchGraph:
    """Work for a GPU that was captured, and is launched as one."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device = device
        self._handle = handle
        self._free = weakref.finalize(self, device._cuda.cudaGraphExecDestroy, handle)

    def launch(self) -> None:
        """Asks for the work once more, on the addresses it was captured with."""
        self._device._call("cudaGraphLaunch", self._handle, self._device._stream)


class DeviceArray:
    """An array in a GPU's memory, C-contiguous, of which numpy gets a copy when it asks for one.

    Args:
        shape: As of numpy's.
        dtype: The same.
        pointer: Of the first element.
        owner: The memory it lies in, which stays as long as this does.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], pointer: int, owner: Buffer
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.pointer = pointer
        self.owner = owner

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Consecutive rows along the first axis, in the same memory."""
        first, end, _ = slice(rows.start, rows.stop).indices(len(self))
        pitch = self.nbytes // max(1, len(self))
        shape = (max(0, end - first), *self.shape[1:])
        return DeviceArray(shape, self.dtype, self.pointer + first * pitch, self.owner)

    def numpy(self) -> NDArray[Any]:
        """A copy in the CPU's memory, when all that was asked of the array's device is done.

        Raises:
            InternalError: Copying failed, or what was asked before.
        """
        array = np.empty(self.shape, self.dtype)
        device = self.owner.device
        device.copy(array.ctypes.data, self.pointer, self.nbytes)
        device.synchronize()
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array of a GPU is copied to be numpy's")
        return self.numpy().astype(self.dtype if dtype is None else dtype, copy=False)


def _runtime() -> ModuleType:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnavailableError(
            "device tensorrt: CUDA is called through a package: pip install cuda-bindings, of the "
            "CUDA version that is installed, such as 'cuda-bindings<13' for JetPack 6: "
            f"{error}"
        ) from error
    module: ModuleType = runtime
    return module


def _require_gpu(cuda: ModuleType) -> None:
    """Raises UnavailableError when there is nothing that CUDA runs on."""
    advice = "run on a machine with an NVIDIA GPU and its driver, or use --device cpu"
    try:
        error, count = cuda.cudaGetDeviceCount()
    except RuntimeError as failure:  # of cuda-python 12.6 to 12.8, without a driver
        raise UnavailableError(f"device tensorrt: no CUDA driver ({failure}): {advice}") from None
    if error != cuda.cudaError_t.cudaSuccess:
        cuda.cudaGetLastError()
        failed = _failure(cuda, "cudaGetDeviceCount", error)
        raise UnavailableError(f"device tensorrt: no GPU here ({failed}): {advice}")
    if not count:
        raise UnavailableError(f"device tensorrt: no GPU here: {advice}")


def _failure(cuda: ModuleType, function: str, error: Any) -> InternalError:
    (_, name), (_, text) = cuda.cudaGetErrorName(error), cuda.cudaGetErrorString(error)
    return InternalError(f"CUDA {function}: {name.decode()}, {text.decode()}")
