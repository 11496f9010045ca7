"""Whether what is timed on our side computes what the reference does, and how it is timed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.alignment import Side
from benchmarks.export_memory import CLIP, decoder_config, write_checkpoint
from benchmarks.reference import Agreement, Reference, Results
from benchmarks.timing import has_bf16, interleaved, machine, median_row
from benchmarks.towers import Model, Tower
from benchmarks.vision import loss, onnxruntime_side, write_graph

from benchmarks import ask_again, timing
from ppllava_engines.bundle import Bundle
from ppllava_engines.memory_layout import MemoryKind
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.modules.config import EncoderConfig, VisionConfig
from ppllava_export.modules.tower import ClipVisionTower
from ppllava_runtime.window import Window
from tiny_videos import numbered_frames, write_video

FRAMES = 4
# A float16 key is off by 2^-11. Times the logit scale (14), a token's weight (below 1/20 here) and
# one over the temperature (100) that is 0.035 of a share; hidden's own 2^-11, and int8's half of
# 1/127, come on top. Another computation would be off by something like one.
TOLERANCES: dict[MemoryKind, float] = {
    "hidden-fp32": 2e-5,
    "hidden": 4e-2,
    "hidden-int8": 5e-2,
    "tokens": 4e-2,
}


@pytest.mark.parametrize("kind", TOLERANCES)
def test_our_side_of_the_alignment_ends_where_the_reference_does(
    checkpoint: Path, bundle: Path, tmp_path: Path, kind: MemoryKind
) -> None:
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    shape = (FRAMES, model.grid[0] * model.grid[1], model.vision_width)
    tokens = np.random.default_rng(0).standard_normal(shape, np.float32)
    ids = np.array([[model.text_bos_token_id, 5, 9, 33, model.text_eos_token_id]])
    window = Window(model.kernel, model.stride)
    expected, _ = Reference.open(checkpoint).align(tokens, ids, (window.kernel, window.stride))
    got = Side(opened, kind, 1, tmp_path).align(tokens, ids, window)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCES[kind] * np.abs(expected).max()


def test_sides_take_turns_and_the_first_run_does_not_count() -> None:
    ran: list[str] = []
    seconds = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, runs=2)
    assert ran == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_row_states_the_median_and_how_much_faster_that_is() -> None:
    assert median_row("ours", [0.002, 0.001, 0.003], 0.007) == "| ours | 2.0 | 1.0 to 3.0 | 3.50 |"


def asked_again(
    bundle: Path, checkpoint: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["ask_again", str(bundle), str(clip), "--frames", "4", "--memory", "hidden-fp32"]
    monkeypatch.setattr(sys, "argv", [*asked, "--checkpoint", str(checkpoint)])
    ask_again.main()


def test_asking_again_is_timed_and_its_result_compared(
    checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(9))
    asked_again(bundle, checkpoint, clip, monkeypatch)
    said = capsys.readouterr().out
    found = re.search(r"differ by (\S+) of their peak, cosine (\S+); rank .* (\S+)$", said, re.M)
    assert found
    error, cosine, correlation = map(float, found.groups())
    # Of float32, through a tower and a pooling whose temperature is 1/100.
    assert error <= 1e-4
    assert cosine == pytest.approx(1, abs=1e-6)
    assert correlation >= 0.999
    assert len(re.findall(r"^[\d.]+ times as fast: ", said, re.M)) == 3


def test_another_result_than_the_references_is_no_ratio(
    checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    align = Reference.align

    def short(*args: Any) -> Results:
        pooled, relevance = align(*args)
        return pooled[:-1], relevance

    monkeypatch.setattr(Reference, "align", short)
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(9))
    with pytest.raises(SystemExit, match="do not compute the same"):
        asked_again(bundle, checkpoint, clip, monkeypatch)
    assert capsys.readouterr().out == ""


def test_the_agreement_is_of_directions_peaks_and_ranks() -> None:
    pooled, relevance = np.array([[3.0, 4.0], [0.0, 10.0]]), np.arange(4.0).reshape(1, 2, 2)
    found = Agreement.of((np.array([[4.0, 3.0], [0.0, 10.0]]), -relevance), (pooled, relevance))
    assert found.error == pytest.approx(1 / 10)
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.correlation == pytest.approx(-1)


def test_every_form_of_a_tower_gives_what_torch_does(tmp_path: Path) -> None:
    config = VisionConfig(EncoderConfig(64, 128, 2, 2), image_size=32, patch_size=8)
    torch.manual_seed(0)
    tower = Tower(ClipVisionTower(config, 2)).eval()
    with torch.device("meta"):
        skeleton = Tower(ClipVisionTower(config, 2)).eval()
    half = (0.5, 0.5, 0.5)
    model = Model("tiny", tower, skeleton, 32, half, half, trained=False)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    with torch.no_grad():
        expected = tower(torch.from_numpy(pixels)).numpy()
        # An int8 step is 1/254 of a peak, and a peak some four deviations: 1 - cos is about the
        # square of a hundredth, once for each of six products a block.
        for form, least in (("fp32", 1e-9), ("int8", 5e-3), ("int8-static", 5e-3)):
            path = tmp_path / f"{form}.onnx"
            write_graph(model, form, path, pixels)
            got = onnxruntime_side(path, 1, alone=form == "int8")(pixels)
            assert got.shape == expected.shape
            assert loss(got, expected) <= least, form


def test_bfloat16_is_what_the_flags_of_the_cpu_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(timing, "_CPUINFO", file)
    assert not has_bf16()
    for flags, there in (("fpu avx2", False), ("avx2 avx512_bf16", True), ("amx_bf16", True)):
        file.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n", encoding="utf-8")
        assert has_bf16() is there
    assert machine("numpy").startswith("Some CPU (amx_bf16), ")


def test_versions_are_those_that_are_installed() -> None:
    assert f"numpy {version('numpy')}" in machine("numpy")


def test_known_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    vision = CLIP["vision_config"] | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 84,
    }
    family = {**CLIP, "btadapter": False, "frame_shape": [6, 6], "vision_config": vision}
    name = "language_model.model.norm.weight"
    value = np.linspace(0, 1, 64, dtype=np.float32)  # float16 has not all of them
    decoder = decoder_config("llama", (64, 48, 1, 2, 2, 300))
    write_checkpoint(tmp_path / "tiny", family | {"image_token_index": 7}, decoder, {name: value})
    read = load_checkpoint(tmp_path / "tiny")
    assert read.config.image_token_index == 7
    assert np.array_equal(read.tensor(name).numpy(), value)
    layers = [
        read.tensor(f"vision_tower.vision_model.encoder.layers.0.self_attn.{part}_proj.weight")
        for part in "qk"
    ]
    assert layers[0].dtype == torch.float16
    assert not torch.equal(*layers)
