"""Ids in, ids out: the cache changes nothing but the time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import DataError, UsageError
from ppllava_engines.onnxruntime import open_session
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders import Sampling
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder

GREEDY = Sampling()
PROMPT = (1, 300, 17, 260, 42, 5, 333)


@pytest.fixture(scope="module")
def decoder(bundle: Path) -> OnnxRuntimeDecoder:
    return OnnxRuntimeDecoder.open(Bundle.open(bundle))


def from_scratch(bundle: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy ids where every step computes the whole sequence anew, without any cache."""
    opened = Bundle.open(bundle)
    spec = opened.manifest.decoder
    session = open_session(opened.file(spec.path))
    table = np.load(opened.file(spec.embedding))
    empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), spec.dtype)
    past = {
        f"past_key_values.{layer}.{part}": empty
        for layer in range(spec.num_layers)
        for part in ("key", "value")
    }
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        feeds = {
            "inputs_embeds": table[ids][None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        (logits,) = session.run(["logits"], feeds | past)
        token = int(logits[0, -1].astype(np.float32).argmax())
        if token in spec.eos_token_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("precision", ["bundle", "bundle_fp16"])
def test_equals_computing_everything_anew(precision: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(precision)
    decoder = OnnxRuntimeDecoder.open(Bundle.open(path))
    for seed in range(2):
        prompt = tuple(np.random.default_rng(seed).integers(4, 384, 9).tolist())
        ids = list(decoder.generate([decoder.embed(prompt)], 16, GREEDY))
        assert ids == from_scratch(path, prompt, 16)
        assert len(ids) > 3


def test_answers_do_not_disturb_each_other(decoder: OnnxRuntimeDecoder) -> None:
    prompts = [decoder.embed(PROMPT), decoder.embed(PROMPT[::-1])]
    expected = [list(decoder.generate([prompt], 20, GREEDY)) for prompt in prompts]
    first = decoder.generate([prompts[0]], 20, GREEDY)
    begun = list(islice(first, 3))
    assert list(decoder.generate([prompts[1]], 20, GREEDY)) == expected[1]
    abandoned = decoder.generate([prompts[1]], 20, GREEDY)
    next(abandoned)
    del abandoned
    assert begun + list(first) == expected[0]
    assert list(decoder.generate([prompts[0]], 20, GREEDY)) == expected[0]


def test_uses_every_position_and_no_more(decoder: OnnxRuntimeDecoder) -> None:
    most = decoder.max_positions
    wild = Sampling(temperature=100.0, seed=3)  # hardly ever ends by itself
    for length in (most - 1, most - 5):
        ids = list(decoder.generate([np.resize(decoder.embed(PROMPT), (length, 64))], 50, wild))
        assert len(ids) == most - length + 1
    with pytest.raises(UsageError) as caught:
        decoder.generate([np.resize(decoder.embed(PROMPT), (most, 64))], 1, GREEDY)
    assert str(caught.value) == (
        "the prompt is 512 tokens long and the model holds 512 with its answer: pool the video to "
        "fewer tokens, or shorten the question"
    )
    with pytest.raises(UsageError, match="max_new_tokens is 0, expected 1 or more"):
        decoder.generate([decoder.embed(PROMPT)], 0, GREEDY)


def test_stops_before_an_end_token(decoder: OnnxRuntimeDecoder) -> None:
    ids = list(decoder.generate([decoder.embed(PROMPT)], 300, Sampling(temperature=2.0, seed=11)))
    assert len(ids) < 300
    assert 2 not in ids


def test_the_same_seed_gives_the_same_answer(decoder: OnnxRuntimeDecoder) -> None:
    def ids(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return list(decoder.generate([decoder.embed(PROMPT)], 30, sampling))

    assert ids(5) == ids(5)
    assert ids(5) != ids(6)


def test_the_table_must_be_that_of_the_manifest(bundle: Path, tmp_path: Path) -> None:
    spec = Bundle.open(bundle).manifest.decoder
    path = tmp_path / "embedding.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match=r"it is float32 \(3, 2\), expected float32 \(384, 64\)"):
        load_array(path, spec.dtype, (spec.vocab_size, spec.width))
    path.write_bytes(b"none")
    with pytest.raises(DataError, match="not an array of embeddings, export it again"):
        load_array(path, spec.dtype, (spec.vocab_size, spec.width))


class TestSampling:
    LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))

    def frequencies(self, sampling: Sampling) -> list[float]:
        random = np.random.default_rng(0)
        picks = [sampling.pick(self.LOGITS, random) for _ in range(4000)]
        return [picks.count(i) / 4000 for i in range(5)]

    def test_is_greedy_without_temperature(self) -> None:
        assert self.frequencies(Sampling()) == [0, 1, 0, 0, 0]

    @pytest.mark.parametrize(
        ("sampling", "expected"),
        [
            (Sampling(temperature=1), [0.1, 0.4, 0.05, 0.3, 0.15]),
            (Sampling(temperature=1, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
            (Sampling(temperature=1, top_p=0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
            (Sampling(temperature=1, top_p=0.01), [0, 1, 0, 0, 0]),
            (Sampling(temperature=5e-324), [0, 1, 0, 0, 0]),
            (Sampling(temperature=0.5), [0.01, 0.16, 0.0025, 0.09, 0.0225]),
        ],
    )
    def test_follows_the_probabilities(self, sampling: Sampling, expected: list[float]) -> None:
        probabilities = np.array(expected) / sum(expected)
        np.testing.assert_allclose(self.frequencies(sampling), probabilities, atol=0.03)

    @given(
        logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
        temperature=st.floats(1e-3, 10),
        top_p=st.floats(0.001, 1),
        top_k=st.integers(0, 30),
    )
    def test_always_picks_something(
        self, logits: list[float], temperature: float, top_p: float, top_k: int
    ) -> None:
        sampling = Sampling(temperature, top_p, top_k)
        token = sampling.pick(np.array(logits, np.float32), np.random.default_rng(0))
        assert 0 <= token < len(logits)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
            ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
            ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
            ({"top_k": -1}, "top_k is -1, expected 0 or more"),
            ({"seed": -1}, "seed is -1, expected 0 or more"),
        ],
    )
    def test_refuses(self, fields: dict[str, float], sentence: str) -> None:
        with pytest.raises(UsageError) as caught:
            Sampling(**fields)  # type: ignore[arg-type]
        assert str(caught.value) == sentence
