"""The committed checkpoint, exported to fp16 and run by the runtime on H.264 files."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ppllava_runtime import Assistant
from tiny_world.agreement import compare
from tiny_world.contrastive import patch_cover
from tiny_world.evaluate import num_tokens
from tiny_world.model import FRAME_SIZE
from tiny_world.world import masks, sample_clip

SAMPLE_SEED = 90_020_364  # of the committed sample.mp4, made by tiny_world.files
CLIPS = 30


@pytest.mark.slow
def test_answers_are_torchs_and_right(tiny_world: Path, tiny_world_bundle: Path) -> None:
    """The full 500 clips are `python -m tiny_world.agreement`; 99.5 % of these are all of them."""
    outcomes = compare(tiny_world_bundle, tiny_world / "checkpoint", CLIPS)
    assert [o for o in outcomes if o.torch != o.runtime] == []
    assert sum(o.runtime == o.question.answer for o in outcomes) >= 0.9 * CLIPS


def test_three_answers_about_the_sample(tiny_world: Path, tiny_world_bundle: Path) -> None:
    video = Assistant.open(tiny_world_bundle).watch(tiny_world / "sample.mp4")
    asked = {
        "What colour is the square?": "purple",
        "Which leaves first, the purple square or the red circle?": "the purple square",
        "Describe the video.": "a red circle, a blue cross and a purple square",
        "Which way does the red circle move?": "left",
    }
    assert {question: video.ask(question).text for question in asked} == asked


def test_stated_accuracy_is_of_this_checkpoint_and_good_enough(tiny_world: Path) -> None:
    stated = json.loads((tiny_world / "accuracy.json").read_text())
    weights = (tiny_world / "checkpoint" / "model.safetensors").read_bytes()
    assert stated["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert stated["clips"] == 1000
    at = {budget["tokens"]: budget for budget in stated["budgets"]}
    assert len(at) >= 4
    assert at[36]["prompt-guided"]["all"] >= 0.9
    assert min(at[36]["prompt-guided"].values()) >= 0.8
    for budget in stated["budgets"]:
        assert budget["prompt-guided"]["all"] > budget["average"]["all"], budget["tokens"]


def test_sample_is_small(tiny_world: Path) -> None:
    assert (tiny_world / "sample.mp4").stat().st_size <= 300_000
    assert sum(f.stat().st_size for f in (tiny_world / "checkpoint").iterdir()) <= 12_000_000


@pytest.mark.parametrize("name", ["red circle", "blue cross", "purple square"])
def test_what_is_asked_about_is_the_warm_spot(
    name: str, tiny_world: Path, tiny_world_bundle: Path
) -> None:
    clip = sample_clip(SAMPLE_SEED)
    video = Assistant.open(tiny_world_bundle).watch(tiny_world / "sample.mp4")
    relevance = video.ask(f"Which way does the {name} move?").relevance
    cover = patch_cover(masks(clip, np.array(video.info.indices) / 39, FRAME_SIZE))
    on = next(c for thing, c in zip(clip.things, cover, strict=True) if thing.name == name)
    others = cover.sum(axis=0) - on
    warmest = np.array(np.unravel_index(relevance.argmax(), relevance.shape))
    assert on[tuple(warmest)] > 0.5
    assert relevance[on > 0.9].min() > relevance[(on == 0) & (others == 0)].max()
    # and warmer than any other thing; their edges touch in one frame, so means are compared
    assert relevance[on > 0.5].mean() > relevance[others > 0.5].mean() + 0.1


def test_fewer_tokens_are_kept_as_asked(tiny_world: Path, tiny_world_bundle: Path) -> None:
    video = Assistant.open(tiny_world_bundle).watch(tiny_world / "sample.mp4")
    for kernel in ((2, 3, 3), (2, 9, 9), (8, 9, 9)):
        answer = video.ask("What colour is the square?", kernel=kernel, stride=kernel)
        assert answer.text
        assert answer.accounting.num_tokens_after == num_tokens(kernel, kernel)
        assert answer.accounting.num_frames_encoded in (0, 8)


def test_no_torch_at_run_time(tiny_world: Path, tiny_world_bundle: Path) -> None:
    import subprocess

    program = (
        "import sys\n"
        "from ppllava_runtime import Assistant\n"
        "print(Assistant.open(sys.argv[1]).watch(sys.argv[2]).ask('Describe the video.').text)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    files = [str(tiny_world_bundle), str(tiny_world / "sample.mp4")]
    command = [sys.executable, "-c", program, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a red circle, a blue cross and a purple square\n"
