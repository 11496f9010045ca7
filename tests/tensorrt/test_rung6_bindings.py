"""Rung 6: the API that the backend is written against, and its doubles offer, is the real one.

The real bindings of TensorRT 10.3, 10.16 and 11.4 are imported over an empty libnvinfer; TensorRT's
lean runtimes and TensorRT-RTX come with their own. Nothing is run on a GPU, and no full TensorRT.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import cuda_double
import tensorrt_double

Run = Callable[..., "subprocess.CompletedProcess[str]"]

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext", "IPluginRegistry", "ILogger")
ENUMS = ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "DataType")
BINDINGS = {"bindings-10.3": 10, "bindings-10.16": 10, "bindings-11.4": 11}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getPluginRegistry",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip

# Prints what a module says of its classes; argv: module, libraries to load first.
DESCRIBE = """
import ctypes, importlib, json, sys
for library in sys.argv[2:]:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
module = importlib.import_module(sys.argv[1])
def told(found):
    return "property" if isinstance(found, property) else found.__doc__ or ""
print(json.dumps({
    name: {key: told(getattr(found, key)) for key in dir(found)}
    for name in dir(module) if isinstance(found := getattr(module, name), type)
} | {"version": module.__version__}))
"""

# The backend itself, over the module; argv: module, a file that is no plan, libraries.
REFUSE = """
import ctypes, importlib, sys
from pathlib import Path
for library in sys.argv[3:]:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
from ppllava_engines.bundle import FileSpec, GraphSpec
from ppllava_engines.errors import PPLLaVAError
from ppllava_engines.tensorrt.execution import Plan, _log
from ppllava_engines.tensorrt.plans import PlanSpec
from ppllava_engines.tensorrt.profiles import Profile
module, path = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
log = _log(module)
log.log(module.ILogger.Severity.WARNING, "not kept")
log.log(module.ILogger.Severity.ERROR, "kept,\\n on one line")
print(log.said())
record = PlanSpec(path=path.name, file=FileSpec.of(path), spec=GraphSpec("g", (), ()),
                  profiles=(Profile("p", {}, {}),), kernel=None, stride=None, plugin=None,
                  seconds=0.0, peak_bytes=0)
try:
    Plan(module, None, path, "vision", record)
except PPLLaVAError as error:
    print(type(error).__name__, error)
"""

# Prints signatures and return conventions of cuda.bindings.runtime, where no GPU need be.
DESCRIBE_CUDA = """
import json, sys
from cuda.bindings import runtime
names, enums = json.loads(sys.argv[1]), json.loads(sys.argv[2])
bad = runtime.cudaError_t.cudaErrorMemoryAllocation
print(json.dumps({
    "signatures": {name: getattr(runtime, name).__doc__.splitlines()[0] for name in names},
    "enums": {name: {m.name: int(m) for m in getattr(runtime, name)} for name in enums},
    "flags": [int(runtime.cudaStreamNonBlocking), int(runtime.cudaHostAllocMapped)],
    "properties": dir(runtime.cudaDeviceProp),
    "name": [int(runtime.cudaGetErrorName(bad)[0]), runtime.cudaGetErrorName(bad)[1].decode()],
    "last": len(runtime.cudaGetLastError()),
}))
"""

# The real Device where there is no GPU.
NO_GPU = """
from ppllava_engines.errors import UnavailableError
from ppllava_engines.tensorrt.device import Device
try:
    Device()
except UnavailableError as error:
    print(error)
"""


@pytest.fixture(scope="session")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Major version → libraries that have what the bindings link to, and do nothing."""
    folder = tmp_path_factory.mktemp("empty")
    source = folder / "empty.c"
    source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    made: dict[int, list[str]] = {}
    for major in (10, 11):
        for name in LIBRARIES:
            soname = f"lib{name}.so.{major}"
            path = folder / soname
            linked = ["-shared", "-fPIC", f"-Wl,-soname,{soname}"]
            subprocess.run(["cc", *linked, "-o", str(path), str(source)], check=True)
            made.setdefault(major, []).append(str(path))
    return made


def api() -> Iterator[tuple[str, str, list[str] | None]]:
    """Class, public name and arguments (None of a property) of all that the double offers."""
    for class_name in CLASSES:
        offered = vars(getattr(tensorrt_double, class_name))
        for name, value in offered.items():
            if name.startswith("_") or isinstance(value, type):
                continue
            arguments = list(inspect.signature(value).parameters)[1:] if callable(value) else None
            yield class_name, name, arguments


def signatures(doc: str, name: str) -> list[list[str]]:
    """The arguments of every overload that a docstring of pybind11's tells."""
    found = re.findall(rf"^(?:\d+\. )?{name}\(self: (.*)\) -> ", doc, re.MULTILINE)
    return [re.findall(r", (\w+): ", arguments) for arguments in found]


def require_api(described: dict[str, dict[str, str]]) -> None:
    for class_name, name, arguments in api():
        real = described[class_name]
        assert name in real, f"{class_name} has no {name}"
        if arguments is None:
            assert real[name] == "property", f"{class_name}.{name} is no property"
        else:
            overloads = signatures(real[name], name)
            assert arguments in overloads, f"{class_name}.{name} takes {overloads}"
    for enum in ENUMS:
        for member in getattr(tensorrt_double, enum):
            assert member.name in described[enum], f"{enum} has no {member.name}"
    for member in tensorrt_double.ILogger.Severity:
        assert member.name in described["ILogger"], f"ILogger.Severity has no {member.name}"


@pytest.mark.parametrize("name", BINDINGS)
def test_the_double_of_tensorrt_offers_what_the_bindings_do(
    name: str, empty_libraries: dict[int, list[str]], run_with: Run
) -> None:
    libraries = empty_libraries[BINDINGS[name]]
    ended = run_with(name, "-c", DESCRIBE, "tensorrt_bindings", *libraries)
    assert ended.returncode == 0, ended.stderr
    described: dict[str, Any] = json.loads(ended.stdout)
    assert described.pop("version").startswith(name.removeprefix("bindings-"))
    require_api(described)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("rtx", "tensorrt_rtx"),
        ("lean-10.16", "tensorrt_lean_bindings"),
        ("lean-11.4", "tensorrt_lean_bindings"),
    ],
)
def test_so_do_the_libraries_that_are_whole(name: str, module: str, run_with: Run) -> None:
    ended = run_with(name, "-c", DESCRIBE, module)
    assert ended.returncode == 0, ended.stderr
    require_api(json.loads(ended.stdout))


@pytest.mark.parametrize("name", BINDINGS)
def test_the_backend_tells_that_tensorrt_does_not_start(
    name: str, empty_libraries: dict[int, list[str]], run_with: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "vision.plan"
    plan.write_bytes(b"no plan")
    libraries = empty_libraries[BINDINGS[name]]
    ended = run_with(name, "-c", REFUSE, "tensorrt_bindings", plan, *libraries)
    said, refused = ended.stdout.splitlines()
    assert said == "kept, on one line"
    assert refused.startswith("UnavailableError vision: TensorRT cannot start: ")


def test_a_real_runtime_is_asked_and_refuses_what_is_no_plan(run_with: Run, tmp_path: Path) -> None:
    """Of the whole libraries only TensorRT-RTX bears it: the lean ones need a GPU, or crash."""
    plan = tmp_path / "vision.plan"
    plan.write_bytes(b"no plan" * 100)
    ended = run_with("rtx", "-c", REFUSE, "tensorrt_rtx", plan)
    assert ended.returncode == 0, ended.stderr
    said, refused = ended.stdout.splitlines()
    assert said == "kept, on one line"
    assert refused.startswith(f"IncompatibleError vision: TensorRT refuses the plan {plan}: ")
    assert refused.endswith(": run ppllava-build again on this machine")
    assert "it does not say why" not in refused


@pytest.mark.parametrize("name", ["cuda-python-12.6", "cuda-python-13"])
def test_the_double_of_cuda_offers_what_cuda_python_does(name: str, run_with: Run) -> None:
    functions = {
        key: list(inspect.signature(value).parameters)[1:]
        for key, value in vars(cuda_double.CudaDouble).items()
        if key.startswith("cuda") and inspect.isfunction(value)
    }
    enums = {
        key: value
        for key, value in vars(cuda_double.CudaDouble).items()
        if isinstance(value, type) and issubclass(value, Enum)
    }
    ended = run_with(
        name, "-c", DESCRIBE_CUDA, json.dumps(list(functions)), json.dumps(list(enums))
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    for key, arguments in functions.items():
        inside = re.search(r"\((.*)\)", told["signatures"][key])
        assert inside
        parts = [part.split(":")[0].split() for part in inside[1].split(",")]
        assert [words[-1] for words in parts if words] == arguments, key
    for key, enum in enums.items():
        for member in enum:
            assert told["enums"][key][member.name] == member.value
    double = cuda_double.CudaDouble
    assert told["flags"] == [double.cudaStreamNonBlocking, double.cudaHostAllocMapped]
    properties = vars(double().cudaGetDeviceProperties(0)[1])
    assert properties.keys() <= set(told["properties"])
    # Every function gives a tuple whose first is the error; names are bytes.
    assert told["name"] == [0, "cudaErrorMemoryAllocation"]
    assert told["last"] == 1


@pytest.mark.parametrize("name", ["cuda-python-12.6", "cuda-python-13"])
def test_a_machine_without_a_gpu_is_told_so(name: str, run_with: Run) -> None:
    ended = run_with(name, "-c", NO_GPU)
    if not ended.stdout:
        assert ended.returncode == 0, ended.stderr
        pytest.skip("a GPU is here")
    assert ended.stdout.startswith("device tensorrt: no ")
    assert ended.stdout.endswith("or use --device cpu\n")


def test_on_a_gpu() -> None:
    pytest.skip("NOT RUN: plans on a GPU: ppllava-check BUNDLE --device tensorrt is rung 8")
