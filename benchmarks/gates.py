"""What speed may cost: answers and relevance maps of fast bundles and small memories.

`PYTHONPATH=examples python -m benchmarks.gates [--clips 200]`

The committed checkpoint of examples/tiny_world is exported in float32 and in each precision that a
speed is claimed for. All are asked one question about each of the same held-out clips. A setting
passes where at least 99 % of its answers are float32's, and where the order of a clip's patches by
relevance is float32's: a rank correlation of at least 0.99 in the mean over clips. Static int8
vision is calibrated on clips of seeds that nothing else uses. OpenVINO has rows where it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.models import ROOT
from benchmarks.reference import rank_correlation
from benchmarks.timing import machine

from ppllava_engines.memory_layout import MemoryKind
from ppllava_export import export_bundle
from ppllava_runtime import Assistant
from tiny_world.agreement import SEEDS, one_question
from tiny_world.files import write_clip
from tiny_world.precisions import CALIBRATION
from tiny_world.world import sample_clip

CHECKPOINT = ROOT / "examples" / "tiny_world" / "checkpoint"
LEAST_EQUAL, LEAST_CORRELATION = 0.99, 0.99
_MAX_NEW_TOKENS = 24
INT8: dict[str, Any] = {"vision": "int8", "decoder": "int8", "prefill": "int8"}


@dataclass(frozen=True)
class Setting:
    """How a bundle is exported, and what its assistant keeps of a video.

    Attributes:
        options: Of `export_bundle`, beyond float32; vision "int8-static" is calibrated int8.
        memory: A kind of memory.
        device: What runs the vision and text graphs.
    """

    options: dict[str, Any] = field(default_factory=dict)
    memory: MemoryKind = "hidden"
    device: str = "cpu"

    @property
    def precision(self) -> str:
        """What its bundle is, in a few words."""
        return ", ".join(["fp32", *(f"{part} {kind}" for part, kind in self.options.items())])

    def __str__(self) -> str:
        return f"{self.precision}, memory {self.memory}, {self.device}"


EXACT = Setting(memory="hidden-fp32")
SETTINGS = (
    Setting(),
    Setting(memory="hidden-int8"),
    Setting(memory="tokens"),
    Setting({"vision": "int8"}),
    Setting({"vision": "int8-static"}),
    Setting({"decoder": "int8", "prefill": "int8"}),
    Setting({"decoder": "int4"}),
    Setting({"decoder": "int4", "prefill": "int8"}),
    Setting(INT8),
    Setting(INT8, memory="hidden-int8"),
    Setting(INT8, memory="tokens"),
)
OPENVINO = (
    Setting(device="openvino"),
    Setting({"vision": "int8-static"}, device="openvino"),
)


@dataclass
class Gate:
    """What a setting changed.

    Attributes:
        setting: Which.
        equal: Answers that are float32's, of `clips`.
        correlations: Of ranks, one per clip.
    """

    setting: Setting
    clips: int = 0
    equal: int = 0
    correlations: list[float] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether it is within what speed may cost."""
        return (
            self.equal >= LEAST_EQUAL * self.clips
            and float(np.mean(self.correlations)) >= LEAST_CORRELATION
        )

    def __str__(self) -> str:
        mean, least = np.mean(self.correlations), min(self.correlations)
        verdict = "yes" if self.passes else "NO"
        return (
            f"| {self.setting} | {self.equal} of {self.clips} | {mean:.5f} | {least:.5f} "
            f"| {verdict} |"
        )


def measure(settings: Sequence[Setting], clips: int, folder: Path) -> list[Gate]:
    """Returns a gate for each setting; bundles and a clip at a time are written to `folder`."""
    everything = (EXACT, *settings)
    bundles = {setting.precision: setting.options for setting in everything}
    for precision, options in bundles.items():
        _export(folder / precision, options)
    exact, *assistants = (
        Assistant.open(folder / setting.precision, device=setting.device, memory=setting.memory)
        for setting in everything
    )
    gates = [Gate(setting) for setting in settings]
    for seed in SEEDS[:clips]:
        clip = sample_clip(seed)
        question, file = one_question(clip).text, folder / "clip.mp4"
        write_clip(clip, file)
        expected = exact.watch(file).ask(question, max_new_tokens=_MAX_NEW_TOKENS)
        for gate, assistant in zip(gates, assistants, strict=True):
            answer = assistant.watch(file).ask(question, max_new_tokens=_MAX_NEW_TOKENS)
            gate.clips += 1
            gate.equal += answer.text == expected.text
            gate.correlations.append(rank_correlation(answer.relevance, expected.relevance))
    return gates


def _export(bundle: Path, options: dict[str, Any]) -> None:
    """Writes a setting's bundle, and the clips that calibrate it beside."""
    videos = []
    if options.get("vision") == "int8-static":
        options = options | {"vision": "int8"}
        videos = [bundle.parent / f"{seed}.mp4" for seed in CALIBRATION]
        for seed, video in zip(CALIBRATION, videos, strict=True):
            write_clip(sample_clip(seed), video)
    export_bundle(CHECKPOINT, bundle, "fp32", calibration=videos, **options)


def main() -> None:
    """Prints a row for each setting, versions and device; fails where one does not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    arguments = parser.parse_args()
    there = find_spec("openvino") is not None
    settings = (*SETTINGS, *OPENVINO) if there else SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        gates = measure(settings, arguments.clips, Path(folder))
    print("| setting | answers as float32's | rank correlation, mean | least | passes |")
    print("|---|---:|---:|---:|---|")
    for gate in gates:
        print(gate)
    versions = ("onnxruntime", "numpy", "torch", *(("openvino",) if there else ()))
    print(f"\n{machine(*versions)}" + ("" if there else "; OpenVINO is not here: NOT RUN"))
    if not all(gate.passes for gate in gates):
        sys.exit("a setting changes more than speed may cost")


if __name__ == "__main__":
    main()
