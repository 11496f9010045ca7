"""Rung 4: the plugin in TensorRT's own registries, and called as TensorRT would call it.

No GPU is needed for either, and none was used: that an engine with the plugin is built and run is
not shown here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# In a process of its own: loads the plugin, prints what the registry gives as JSON.
REGISTRY = """
import json, sys
import numpy as np
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
before = [c.name for c in registry.all_creators if c.plugin_namespace == "ppllava"]
registry.load_library(sys.argv[1])
creator = registry.get_creator("StridedWeightedPool", "1", "ppllava")

def field(name, values, dtype, kind):
    return trt.PluginField(name, np.array(values, dtype), kind)

INT32, FLOAT32 = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
temperature = field("temperature", [0.01], np.float32, FLOAT32)
kernel = field("kernel", [2, 3, 3], np.int32, INT32)
stride = field("stride", [2, 3, 3], np.int32, INT32)
lists = {
    "attributes": [temperature, kernel, stride],
    "inputs": [temperature],
    "no temperature": [kernel, stride],
    "no stride": [temperature, kernel],
    "kernel of zero": [temperature, field("kernel", [0, 3, 3], np.int32, INT32), stride],
    "kernel of two": [temperature, field("kernel", [3, 3], np.int32, INT32), stride],
    "unknown field": [temperature, field("colour", [3], np.int32, INT32)],
}
created = {
    name: [
        creator.create_plugin("pool", trt.PluginFieldCollection(fields), phase) is not None
        for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME)
    ]
    for name, fields in lists.items()
}
print(json.dumps({
    "version": trt.__version__,
    "before": before,
    "after": [c.name for c in registry.all_creators if c.plugin_namespace == "ppllava"],
    "fields": [f.name for f in creator.field_names],
    "created": created,
}))
"""


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_tensorrt_s_registry_finds_and_creates_it(
    version: str, plugin: Path, run_with: Run
) -> None:
    done = run_with(f"lean-{version}", "-c", REGISTRY, plugin)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith(f"{version}.")
    assert (told["before"], told["after"]) == ([], ["StridedWeightedPool"])
    assert told["fields"] == ["temperature", "kernel", "stride"]
    accepted = {name for name, made in told["created"].items() if made == [True, True]}
    refused = {name for name, made in told["created"].items() if made == [False, False]}
    assert accepted == {"attributes", "inputs"}
    assert len(refused) == 5
    # Each twice: for building, and for an engine that is read.
    for sentence in (
        "the field temperature is missing",
        "the field kernel is there without stride: give both, or both as inputs",
        "the field kernel has 0 on axis 0, expected 1 to 2147483647",
        "the field kernel must be three integers",
        "the field colour is unknown, expected temperature, kernel and stride",
    ):
        assert done.stderr.count(f"ppllava::StridedWeightedPool: {sentence}\n") == 2


def test_it_keeps_its_contract(plugin: Path) -> None:
    done = subprocess.run(
        [plugin.parent / "ppllava_plugin_contract", plugin],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "plugin contract: 0 failures" in done.stdout


def test_it_exports_two_functions_and_needs_no_tensorrt(plugin: Path) -> None:
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("NOT RUN: binutils are not here")
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", plugin], capture_output=True, text=True, check=True
    ).stdout
    assert sorted(line.split()[-1] for line in symbols.splitlines()) == [
        "getCreators",
        "setLoggerFinder",
    ]
    header = subprocess.run([readelf, "-d", plugin], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", header.stdout)
    assert needed
    assert not [name for name in needed if re.match(r"libn?vinfer|libcuda", name)]
