from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_bundle import write_bundle

# Opens a bundle and runs a graph on one thread, then names every thread of the process.
SCRIPT = """
import os, sys
import numpy as np
from ppllava_engines.bundle import Bundle
engine = Bundle.open(sys.argv[1]).engine("scale", threads=1)
engine.run({name: np.ones((1, 3), np.float32) for name in "xw"})
print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")))
"""


def test_onnxruntime_reports_nothing_to_anyone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "0",  # what someone may have set must not switch it on
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(write_bundle(tmp_path / "bundle"))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1 1\n"  # switched off, and no thread but the first
    assert list(home.rglob("*")) == []
