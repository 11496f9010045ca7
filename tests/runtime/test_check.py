"""Every way in which a bundle can answer nonsense without an error is found and said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import ppllava_runtime.local
from ppllava_engines.bundle import MANIFEST, Bundle, DecoderSpec, ModelSpec, hash_files
from ppllava_engines.errors import run_command
from ppllava_engines.memory_parity import MEMORY_STAGES
from ppllava_engines.parity import STAGES
from ppllava_engines.samples import SAMPLES
from ppllava_export import export_bundle
from ppllava_runtime import check, trial
from ppllava_runtime.check import Report, check_bundle, main
from ppllava_runtime.trial import Seen
from ppllava_runtime.video import ChosenFrames
from tiny_checkpoint import write_checkpoint
from tiny_videos import write_video

CLIP_FINDINGS = (
    "decoding", "finite", "logits", "answers", "variety", "clip or blank", "clip or reversed",
)  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same shapes and of other weights."""
    folder = tmp_path_factory.mktemp("other")
    export_bundle(write_checkpoint(folder, seed=1), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def rehash(bundle: Path, **changes: Any) -> Path:
    """The bundle, whose manifest says what is there now, with changes to model and decoder."""
    manifest = Bundle(bundle, read_manifest(bundle)).manifest
    parts: dict[str, Any] = {"files": hash_files(bundle)}
    for part, kind in (("model", ModelSpec), ("decoder", DecoderSpec)):
        names = {field.name for field in dataclasses.fields(kind)}
        wanted = {name: value for name, value in changes.items() if name in names}
        parts[part] = dataclasses.replace(getattr(manifest, part), **wanted)
    changed = dataclasses.replace(manifest, **parts)
    (bundle / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return bundle


def read_manifest(bundle: Path) -> Any:
    from ppllava_engines.bundle import Manifest

    return Manifest.from_json((bundle / MANIFEST).read_text(encoding="utf-8"))


def edit_graph(path: Path, edit: Callable[[str, NDArray[Any]], NDArray[Any] | None]) -> None:
    """Changes initializers of a graph; `edit` returns a new value or None."""
    model = onnx.load(str(path))
    num_edits = 0
    for initializer in model.graph.initializer:
        value = edit(initializer.name, onnx.numpy_helper.to_array(initializer))
        if value is not None:
            initializer.CopyFrom(onnx.numpy_helper.from_array(value, initializer.name))
            num_edits += 1
    assert num_edits, [initializer.name for initializer in model.graph.initializer]
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(model, path)


def bad(report: Report) -> list[str]:
    return [found.name for found in report.findings if found.status == "bad"]


def status(report: Report, name: str) -> str:
    return next(found.status for found in report.findings if found.name == name)


def detail(report: Report, name: str) -> str:
    return next(found.detail for found in report.findings if found.name == name)


@pytest.mark.parametrize("name", ["bundle", "bundle_fp16"])
def test_a_sound_bundle(
    request: pytest.FixtureRequest, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(name)
    assert main([str(path), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict: sound"
    clips = [line.partition(":")[0] for line in lines[-5:-1]]
    assert clips == ["clip", "reversed", "blank", "still"]
    report = check_bundle(path)
    assert {found.status for found in report.findings} == {"ok"}
    stages = STAGES + (MEMORY_STAGES if name == "bundle" else MEMORY_STAGES[1:])
    assert [found.name for found in report.findings] == [
        "files", "embeddings", *(f"replay {stage}" for stage in stages), *CLIP_FINDINGS,
    ]  # fmt: skip


def test_json_says_the_same(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["verdict"] == "sound"
    assert [stage["name"] for stage in record["stages"]] == [*STAGES, *MEMORY_STAGES]
    assert set(record["answers"]) == {"clip", "reversed", "blank", "still"}


def test_a_bundle_without_tokenizers_is_asked_in_ids(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", skip_tokenizer=True)
    report = check_bundle(tmp_path / "bundle")
    assert report.verdict == "sound"
    assert all(answer.split()[0].isdigit() for answer in report.answers.values())


def test_a_video_of_ones_own(bundle: Path, tmp_path: Path) -> None:
    frames = trial.moving_frames(12)[:, :, ::-1]
    own = write_video(tmp_path / "own.mp4", frames)
    report = check_bundle(bundle, video=own)
    assert report.verdict == "sound"
    still = write_video(tmp_path / "still.mp4", np.repeat(frames[:1], 12, axis=0))
    report = check_bundle(bundle, video=still)
    assert report.verdict == "sound"
    assert status(report, "clip or reversed") == "untold"
    assert "looks the same backwards" in detail(report, "clip or reversed")


# What only a replay can find: the files are whole, and are others.


@pytest.mark.parametrize(
    ("files", "stage"),
    [
        ("graphs/vision.onnx*", "replay keys"),
        ("graphs/text.onnx*", "replay text_embed"),
        ("graphs/pool.onnx*", "replay pooled"),
        ("decoder/model.onnx*", "replay logits"),
        ("decoder/embedding.npy", "replay logits"),
    ],
)
def test_parts_of_another_model(
    copy: Path, other: Path, files: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in other.glob(files):
        shutil.copy(path, copy / path.relative_to(other))
    assert main([str(rehash(copy))]) == 70
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("verdict: unsound: replay")
    assert f"{stage}: " in last


def test_a_table_whose_rows_are_shifted(copy: Path) -> None:
    path = copy / "decoder/embedding.npy"
    np.save(path, np.roll(np.load(path), 1, axis=0))
    assert "replay logits" in bad(check_bundle(rehash(copy)))


def test_a_table_with_a_row_that_no_sample_uses(copy: Path) -> None:
    with np.load(copy / SAMPLES) as samples:
        used = {*samples["prompt_before"].tolist(), *samples["prompt_after"].tolist()}
    path = copy / "decoder/embedding.npy"
    table = np.load(path)
    unused = next(row for row in reversed(range(len(table))) if row not in used)
    table[unused] = np.nan
    np.save(path, table)
    report = check_bundle(rehash(copy))
    assert "embeddings" in bad(report)
    assert "1 of 384 rows" in detail(report, "embeddings")


def test_normalisation_of_another_model(copy: Path) -> None:
    report = check_bundle(rehash(copy, image_mean=(0.5, 0.5, 0.5)))
    assert "replay keys" in bad(report)


def test_image_embeddings_that_are_zero(copy: Path) -> None:
    for name in ("pool", "pool_fp16"):
        edit_graph(
            copy / f"graphs/{name}.onnx",
            lambda _, value: np.zeros_like(value) if value.ndim == 2 and value.size > 1 else None,
        )
    report = check_bundle(rehash(copy))
    assert {"replay pooled", "clip or blank", "clip or reversed"} <= set(bad(report))
    assert "pooling gives the same for both" in detail(report, "clip or blank")


def test_arithmetic_that_overflows(bundle_fp16: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_fp16, tmp_path / "copy"))

    def overflowing(_: str, value: NDArray[Any]) -> NDArray[Any] | None:
        large = value.dtype == np.float16 and value.ndim == 2
        return np.full_like(value, 60000) if large else None

    edit_graph(copy / "graphs/vision.onnx", overflowing)
    report = check_bundle(rehash(copy))
    assert {"replay hidden", "finite"} <= set(bad(report))
    assert "the arithmetic overflows" in report.verdict
    assert json.loads(report.to_json())["verdict"] == report.verdict


def test_a_decoder_that_prefers_nothing(copy: Path) -> None:
    vocabulary = read_manifest(copy).decoder.vocab_size
    edit_graph(
        copy / "decoder/model.onnx",
        lambda _, value: np.zeros_like(value) if vocabulary in value.shape else None,
    )
    report = check_bundle(rehash(copy))
    assert {"replay logits", "logits", "variety", "clip or blank"} <= set(bad(report))
    assert "the decoder ignores what it is shown" in detail(report, "clip or blank")


def test_answers_that_end_at_once(copy: Path) -> None:
    vocabulary = json.loads((copy / "tokenizers/decoder.json").read_text())["model"]["vocab"]
    # What ends an answer is no part of a question, and "▁" stands for its spaces.
    asked = {id_ for token, id_ in vocabulary.items() if token in f"{check._QUESTION}▁"}
    ends = tuple(id_ for id_ in range(read_manifest(copy).decoder.vocab_size) if id_ not in asked)
    assert bad(check_bundle(rehash(copy, eos_token_ids=ends))) == ["answers"]


@pytest.mark.parametrize(
    "template",
    ["USER: {question} ASSISTANT: ", "<image>\n<image>\n{question}", "USER: <image>\n", ""],
)
def test_a_template_without_its_places(copy: Path, template: str) -> None:
    report = check_bundle(rehash(copy, chat_template=template))
    assert bad(report) == ["template"]


def test_a_template_whose_place_is_another_token(copy: Path) -> None:
    report = check_bundle(rehash(copy, image_token_index=7))
    assert bad(report) == ["template"]
    assert "gives 0 image tokens" in report.verdict


def test_a_tokenizer_of_a_larger_model(copy: Path) -> None:
    path = copy / "tokenizers/decoder.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        vocabulary[letter] = 5000 + place
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert bad(check_bundle(rehash(copy))) == ["tokenizer"]


# What a replay cannot find: the graphs are right, and do not get what was filmed.


def test_a_separator_of_a_pictures_rows_that_is_not_finite(copy: Path) -> None:
    path = copy / "image_newline.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    report = check_bundle(rehash(copy))
    assert detail(report, "finite").startswith("NaN or infinite in still: ")


def test_a_clip_with_nothing_in_it_tells_nothing(bundle: Path, tmp_path: Path) -> None:
    grey = np.full((24, 48, 64, 3), 128, np.uint8)
    report = check_bundle(bundle, video=trial.write_clip(tmp_path / "grey.mkv", grey))
    assert bad(report) == []
    assert status(report, "clip or blank") == status(report, "clip or reversed") == "untold"


def test_what_the_pooling_magnifies_is_no_measure_of_logits(copy: Path) -> None:
    with np.load(copy / SAMPLES) as arrays:
        samples = dict(arrays)
    np.savez(copy / SAMPLES, **samples | {"gain": np.float32(1e9)})
    assert check_bundle(rehash(copy)).verdict == "sound"


def altered_reading(alter: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Any:
    class Altered(ChosenFrames):
        def __iter__(self) -> Iterator[tuple[tuple[int, ...], NDArray[np.uint8]]]:
            rows, frames = zip(*super().__iter__(), strict=True)
            return zip(rows, alter(np.stack(frames)), strict=True)

    return Altered


def by_brightness(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames in an order that does not depend on when they come."""
    left = frames[:, :, : frames.shape[2] // 2].mean(axis=(1, 2, 3))
    return frames[np.argsort(left)]


@pytest.mark.parametrize(
    ("alter", "expected", "where"),
    [
        (by_brightness, {"decoding", "clip or reversed"}, ""),
        (np.zeros_like, {"decoding", "clip or blank", "clip or reversed"}, "drops the video"),
        (lambda frames: frames[..., ::-1], {"decoding"}, "decoded wrongly"),
    ],
    ids=["order", "pictures", "colours"],
)
def test_a_runtime_that_loses(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    alter: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    expected: set[str],
    where: str,
) -> None:
    monkeypatch.setattr(ppllava_runtime.local, "ChosenFrames", altered_reading(alter))
    report = check_bundle(bundle)
    assert set(bad(report)) == expected
    assert where in report.verdict


# What cannot be told must not be called broken.


def test_a_window_over_all_frames_tells_nothing_of_their_order(copy: Path) -> None:
    report = check_bundle(
        rehash(copy, max_frames=8, default_frames=8, kernel=(8, 2, 2), stride=(8, 2, 2))
    )
    assert report.verdict == "sound"
    assert status(report, "clip or reversed") == "untold"
    assert "one window spans all 8 frames" in detail(report, "clip or reversed")


def test_a_model_of_stills_tells_nothing_of_order(copy: Path) -> None:
    report = check_bundle(rehash(copy, max_frames=1, default_frames=1))
    assert report.verdict == "sound"
    assert status(report, "clip or reversed") == "untold"


# What is not a bundle, or not for here.


def test_damage_is_not_a_verdict(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(tmp_path / "nowhere")]) == 66
    path = copy / "graphs/vision.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run_command(main, [str(copy)]) == 65
    table = np.load(copy / "decoder/embedding.npy")
    np.save(copy / "decoder/embedding.npy", table[:-1])
    assert run_command(main, [str(rehash(copy))]) == 65
    (copy / SAMPLES).write_bytes(b"PK")
    assert run_command(main, [str(rehash(copy))]) == 65
    text = (copy / MANIFEST).read_text(encoding="utf-8")
    (copy / MANIFEST).write_text(text.replace('"schema_version": ', '"schema_version": 9'))
    assert run_command(main, [str(copy)]) == 78
    printed = capsys.readouterr()
    said = printed.out.splitlines()
    assert [line[:18] for line in said] == ["verdict: unsound: "] * 3
    assert [line[:7] for line in printed.err.splitlines()] == ["error: "] * 5


# The measure itself.


def seen(logits: list[list[float]], ids: tuple[int, ...]) -> Seen:
    return Seen(
        memory=None,  # type: ignore[arg-type]  # not looked at
        window=None,  # type: ignore[arg-type]
        prompt_embeds=np.zeros((1, 1)),
        logits=np.array(logits, np.float32),
        ids=ids,
        text="",
        frame_error=0.0,
    )


def test_difference_is_the_largest_while_the_ids_agree() -> None:
    first = seen([[1, 0], [2, 0], [9, 9]], (0, 0, 0))
    assert trial.difference(first, first) == 0
    assert trial.difference(first, seen([[1, 0], [2, 1], [0, 0]], (0, 1, 0))) == 0.5
    assert trial.difference(first, seen([[0, 1]], (1,))) == 1
    assert trial.difference(first, seen([[np.nan, 1]], (1,))) == np.inf
    assert trial.share(np.zeros((2, 2)), np.zeros((2, 3))) == np.inf
