"""Answers of an untrained model that are what was asked for all the same."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    InternalError,
    UnavailableError,
    UsageError,
)
from ppllava_runtime.constraint import Grammars
from ppllava_runtime.decoders import Constraint, Sampling
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
from ppllava_runtime.prompt import PromptBuilder

PROMPT = (1, 300, 17, 260, 42, 5, 333)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"seen": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["seen", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def grammars(opened: Bundle) -> Grammars:
    return Grammars.open(opened)


def answer(opened: Bundle, constraint: Constraint, seed: int, most: int = 200) -> tuple[str, str]:
    """Text, and why it ended; drawn so wildly that it says anything that may be said."""
    decoder, stream = OnnxRuntimeDecoder.open(opened), PromptBuilder.open(opened).stream()
    sampling = Sampling(temperature=50.0, seed=seed)
    ids = decoder.generate([decoder.embed(PROMPT)], most, sampling, constraint)
    text = ""
    while True:
        try:
            text += stream.push(next(ids))
        except StopIteration as end:
            return text + stream.finish(), end.value


def test_json_is_of_its_schema_in_one_line(opened: Bundle, grammars: Grammars) -> None:
    schemas: list[str | dict[str, Any]] = [SCHEMA, json.dumps(SCHEMA)]
    for seed, schema in enumerate(schemas):
        text, reason = answer(opened, grammars.constraint(json_schema=schema), seed)
        said = json.loads(text)
        assert reason == "stop"
        assert list(said) == ["seen", "count"]
        assert said["seen"] in ("cat", "dog")
        assert said["count"] <= 9
        assert text.startswith(f'{{"seen": "{said["seen"]}", "count": ')


def test_the_whole_answer_matches_an_expression(opened: Bundle, grammars: Grammars) -> None:
    expression = "(yes|no), [0-9]{2}"
    said = set()
    for seed in range(4):
        text, reason = answer(opened, grammars.constraint(regex=expression), seed)
        assert re.fullmatch(expression, text)
        assert reason == "stop"
        said.add(text)
    assert len(said) > 1  # what may be said is still the model's choice
    text, reason = answer(opened, grammars.constraint(regex="a{50}"), 0, most=10)
    assert (set(text), reason) == ({"a"}, "length")


def test_an_end_may_come_only_where_the_answer_is_complete(
    opened: Bundle, grammars: Grammars
) -> None:
    end = opened.manifest.decoder.eos_token_ids[0]
    constraint = grammars.constraint(regex="a+")
    before = constraint.allowed()
    assert before.shape == (opened.manifest.decoder.vocab_size,)
    assert not before[end]
    constraint.accept(int(np.flatnonzero(before)[0]))
    assert constraint.allowed()[end]
    assert not constraint.finished
    other = int(np.flatnonzero(~constraint.allowed())[0])
    with pytest.raises(InternalError, match=f"constraint: id {other} came, which is not allowed"):
        constraint.accept(other)


@pytest.mark.parametrize("regex", ["a{1000000}", "ba{1000000}"])
def test_what_is_too_large_is_refused_at_once(grammars: Grammars, regex: str) -> None:
    with pytest.raises(UsageError) as caught:
        grammars.constraint(regex=regex)
    assert str(caught.value) == (
        "regex is not one that answers can follow: lexer error: too many expressions constructed"
    )


def test_what_only_some_answers_find_too_large_is_no_bug(
    opened: Bundle, grammars: Grammars
) -> None:
    constraint = grammars.constraint(regex="X|a{1000000}")
    tokenizer = opened.manifest.tokenizers["decoder"]
    letters = json.loads(opened.file(tokenizer).read_text(encoding="utf-8"))["model"]["vocab"]
    assert constraint.allowed()[[letters["X"], letters["a"]]].all()
    with pytest.raises(UsageError, match=r"follow: lexer error: too many expressions constructed$"):
        for _ in range(2):
            constraint.accept(letters["a"])
            constraint.allowed()


def test_a_schema_may_be_true(opened: Bundle, grammars: Grammars) -> None:
    schemas: list[Any] = ["true", True, {}]
    texts = [answer(opened, grammars.constraint(json_schema=s), 3, most=12) for s in schemas]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "either a json_schema or a regex: give one of them"),
        ({"regex": "a", "json_schema": SCHEMA}, "either a json_schema or a regex"),
        ({"regex": "a(b"}, "regex is not one that answers can follow: .*unclosed group"),
        ({"json_schema": {"type": "cat"}}, "json_schema is not one that answers can follow: .*cat"),
        ({"json_schema": '{"type":'}, "json_schema is not JSON: "),
        ({"json_schema": {"enum": [b"x"]}}, "json_schema is not JSON: "),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema is not JSON: "),
        ({"json_schema": "false"}, "json_schema is not one that .*Unsatisfiable schema"),
        ({"json_schema": "[1]"}, r"follow: expected an object, true or false, got \[1\]$"),
        ({"json_schema": "[" * 100_000}, "json_schema is not one that .*nested too deeply$"),
        ({"json_schema": {"enum": ["\udcff"]}}, "json_schema is not one that .*surrogate"),
        ({"regex": r"[^\x00-\U0010ffff]"}, "follow: the model has no token for it$"),
        ({"regex": "a\udcff"}, "regex has no character at position 1, only a part of one"),
        ({"regex": 3}, "regex takes a string, got 3$"),
    ],
)
def test_refuses(grammars: Grammars, asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        grammars.constraint(**asked)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_told(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="llguidance cannot read the tokenizer, export it again"):
        Grammars("{}", 5, [2])
    bare = dataclasses.replace(opened.manifest, tokenizers={})
    with pytest.raises(IncompatibleError, match="exported without tokenizers, so its answers"):
        Grammars.open(Bundle(opened.path, bare))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnavailableError, match=r'pip install "ppllava-edge\[grammar\]"'):
        Grammars.open(opened)
