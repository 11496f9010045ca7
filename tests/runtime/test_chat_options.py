"""What the command line says of memory and turns, and of the form of answers."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ppllava_engines.errors import NotFoundError, UsageError
from ppllava_runtime import chat
from tiny_videos import numbered_frames, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(12))


class Chat:
    """Runs the command in this process; gives back what it printed as JSON, line by line."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = patch

    def __call__(self, *arguments: object, typed: str = "") -> list[dict[str, Any]]:
        self._patch.setattr(sys, "stdin", io.StringIO(typed))
        told = [*map(str, arguments), "--json", "--frames", "4", "--max-new-tokens", "5"]
        chat.main(told if arguments[1] != "-" else [*told[:-4], *told[-2:]])
        out, self.err = self._capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    return Chat(capsys, monkeypatch)


def test_turns_follow_each_other_if_told_to(run: Chat, bundle: Path, clip: Path) -> None:
    lengths, pooling = {}, {}
    for turns in (None, "re-pool", "keep"):
        told = ["--turns", turns] if turns else []
        records = run(bundle, clip, *told, "--tokens", 6, typed="one?\ncaf\udce9\ntwo?\n")
        assert [record["question"] for record in records] == ["one?", "two?"]
        assert "the question is not text" in run.err
        costs = [record["accounting"] for record in records]
        lengths[turns] = [cost["num_prompt_tokens"] for cost in costs]
        pooling[turns] = costs[1]["milliseconds"]["pool"]
    assert lengths[None][0] == lengths[None][1]
    assert lengths["re-pool"] == lengths["keep"]
    assert lengths["keep"][1] > lengths["keep"][0] + 5
    assert pooling["keep"] == 0 < pooling["re-pool"]


def test_turns_need_nothing_to_be_seen(run: Chat, bundle: Path) -> None:
    one, two = run(bundle, "-", "--turns", "keep", typed="one?\ntwo?\n")
    sizes = [record["accounting"]["num_prompt_tokens"] for record in (one, two)]
    assert sizes[1] > sizes[0] + 5


@pytest.mark.parametrize("memory", ["hidden-fp32", "hidden-int8", "tokens"])
def test_other_memories_answer_too(run: Chat, bundle: Path, clip: Path, memory: str) -> None:
    (record,) = run(bundle, clip, "What moves?", "--memory", memory)
    assert record["answer"]


def test_answers_take_the_form_they_are_told(
    run: Chat, bundle: Path, clip: Path, tmp_path: Path
) -> None:
    (whole,) = run(bundle, clip, "What moves?")
    letter = whole["answer"][2]
    (ended,) = run(bundle, clip, "What moves?", "--stop", letter)
    assert ended["answer"] == whole["answer"].split(letter)[0].rstrip()
    pytest.importorskip("llguidance")
    (number,) = run(bundle, clip, "How many?", "--regex", "[0-9]{3}")
    assert number["answer"].isdigit()
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "boolean"}')
    (boolean,) = run(bundle, clip, "Is it?", "--json-schema", schema)
    assert json.loads(boolean["answer"]) in (True, False)


def test_says_what_it_cannot_take(run: Chat, bundle_fp16: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the bundle computes in float16"):
        run(bundle_fp16, clip, "What moves?", "--memory", "hidden-fp32")
    with pytest.raises(NotFoundError, match=r"schema .*none\.json: no such file"):
        run(bundle_fp16, clip, "Is it?", "--json-schema", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--stop", ""], "stop has '' in it"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--regex", "a(b"], "regex is not one that answers can follow"),
        (["--json-schema", "schema.json"], "json_schema is not JSON"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said_before_the_video_is_watched(
    run: Chat,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    sentence: str,
) -> None:
    if option[0] in ("--regex", "--json-schema"):
        pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(sentence)):
        run(bundle, tmp_path / "none.mp4", *option, typed="What moves?\n")


def test_keeps_nothing_where_nothing_is_seen(run: Chat, bundle: Path) -> None:
    with pytest.raises(UsageError, match="--memory: of no meaning without a video, leave it out"):
        run(bundle, "-", "Why?", "--memory", "hidden")


def test_says_why_an_answer_ended(run: Chat, bundle: Path, clip: Path) -> None:
    (cut,) = run(bundle, clip, "What moves?")
    (ended,) = run(bundle, clip, "What moves?", "--stop", cut["answer"][1])
    assert [cut["finish_reason"], ended["finish_reason"]] == ["length", "stop"]
