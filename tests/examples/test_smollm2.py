"""SmolLM2 as the decoder: transformers' own ids, an answer in words, and what int8 costs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from ppllava_engines.onnxruntime import open_session
from ppllava_export import export_bundle
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.decoder import export_decoder
from ppllava_export.quiet import quiet
from ppllava_runtime import Assistant
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
from ppllava_runtime.decoders.sampling import Sampling
from smollm2.assemble import assemble
from smollm2.gguf_file import INSTALL, PACKAGE, find_file
from smollm2.llama import TEXT
from smollm2.perplexity import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(PACKAGE) is None or find_spec("gguf") is None,
        reason=f"SmolLM2 is not installed: {INSTALL}",
    ),
]

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "How many legs has a spider?",
    "Name three fruits.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Who wrote Hamlet?",
    "Explain photosynthesis in one sentence.",
    "What should I cook tonight?",
    "Give me a synonym of happy.",
    "Is a whale a fish?",
    "Write a Python function that adds two numbers.",
    "Which planet is the largest?",
    "What is the opposite of hot?",
    "Tell me a joke about cats.",
    "When did the Second World War end?",
    "Describe a sunset.",
    "What does CPU stand for?",
    "List the primary colours.",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assembled checkpoint."""
    return assemble(tmp_path_factory.mktemp("smollm2"), find_file())


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    """The decoder's."""
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """What transformers itself reads from the GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with quiet():
        config = LlamaConfig(**load_gguf_checkpoint(str(find_file()))["config"])
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        tensors = load_gguf_checkpoint(str(find_file()), return_tensors=True, model_to_load=model)[
            "tensors"
        ]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.train(False)
    return model


def test_greedy_ids_are_those_of_transformers(
    smollm2: Path, tokenizer: Tokenizer, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    """20 prompts of 64 new tokens each, past the end of the answer if need be.

    transformers sees the ids that came out of the graph. As long as its likeliest token after each
    of them is the next one, they are what it writes on its own.
    """
    checkpoint = load_checkpoint(smollm2)
    with quiet():
        spec = export_decoder(
            checkpoint.model().language_model,
            (),
            torch.float32,
            tmp_path,
            quantization=None,
            release=checkpoint.weights.release,
        )
    table = np.load(tmp_path / spec.embedding, mmap_mode="r")
    decoder = OnnxRuntimeDecoder(open_session(tmp_path / spec.path), None, table, spec)
    for question in QUESTIONS:
        turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer.encode(turn, add_special_tokens=False).ids
        ids = list(decoder.generate([decoder.embed(prompt)], NEW_TOKENS, Sampling()))
        assert len(ids) == NEW_TOKENS
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == ids, question


def test_int8_answers_in_words_and_loses_little(
    smollm2: Path, tokenizer: Tokenizer, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    manifest = export_bundle(smollm2, tmp_path / "bundle", decoder="int8")
    assert "Paris" in Assistant.open(tmp_path / "bundle").ask("What is the capital of France?").text
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:200]
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, :-1]
    exact = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    lost = losses(tmp_path / "bundle", manifest.decoder, ids).mean() - exact
    # A step of the weights is 2 % of their spread and the logits follow; the full text's 0.015.
    assert abs(lost) <= 0.05


def test_tokens_are_those_of_llama_cpp(tokenizer: Tokenizer) -> None:
    """Recorded from llama-cpp-python 0.3.36."""
    text = "In 1984, 3.14159 people\n\n  paid $2,000!!  Don't they're"
    expected = [788, 216, 33, 41, 40, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41, 701, 8866, 5940]
    expected += [1885, 34, 28, 32, 32, 32, 10095, 216, 4250, 982, 502, 2316]
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turn_ids = [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.encode(turn, add_special_tokens=False).ids == turn_ids
    assert tokenizer.get_vocab()["<image>"] == 16
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
