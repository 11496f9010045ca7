"""The contract between export and runtime, and the backends that run a bundle's graphs.

`bundle` says what a bundle holds, `engine` runs one graph, `errors` is every way to fail.
Nothing here knows torch, the exporter or the runtime.
"""

from __future__ import annotations

import os

# ONNX Runtime's wheels start a telemetry uploader on import unless this is set before it: a thread,
# files under ~/.cache, and traffic nobody asked for. Assigned, not defaulted: a "0" inherited from
# the environment must not switch it on. Every module that imports onnxruntime imports this first.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
