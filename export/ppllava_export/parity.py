"""Torch against every graph of a bundle, stage by stage → a report kept in the bundle.

Each graph is given exactly what torch is given, rounded to the graph's own types first, so that a
stage's numbers are its own and not those of the stages before it. Torch computes in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ppllava_engines.bundle import DecoderSpec, GraphSpec, TensorSpec
from ppllava_engines.engine import Engine, open_engine
from ppllava_engines.onnxruntime import open_session

from .config_files import text_token_ids
from .graphs import VISION_TOKENS
from .modules.config import ModelConfig
from .modules.model import PPLLaVA
from .modules.pooling import strided_weighted_pool, token_weights
from .report import Parity, Stage

Array = np.ndarray[Any, np.dtype[Any]]

_SEED = 0
_QUESTION_TOKENS = 12
_PROMPT_TOKENS = 8  # on either side of the pooled ones


@dataclass(frozen=True)
class Inputs:
    """What the stages are compared on, seeded: frames (T, 3, S, S), question (1, n), prompt (n)."""

    pixel_values: Array
    question_ids: Array
    prompt_ids: Array

    @staticmethod
    def of(config: ModelConfig) -> Inputs:
        """Returns inputs that a model of this config takes."""
        rng = np.random.default_rng(_SEED)
        frames = min(2 * config.kernel[0], config.max_frames)
        side = config.vision.image_size
        begin, end = text_token_ids(config.text)
        length = min(_QUESTION_TOKENS, config.text.positions) - 2
        words = rng.integers(0, config.text.vocab_size, length)
        words = words[(words != begin) & (words != end)]
        return Inputs(
            rng.standard_normal((frames, 3, side, side), dtype=np.float32),
            np.concatenate([[begin], words, [end]])[None],
            rng.integers(0, config.decoder["vocab_size"], 2 * _PROMPT_TOKENS),
        )


def measure(
    model: PPLLaVA,
    graphs: Mapping[str, GraphSpec],
    decoder: DecoderSpec,
    folder: Path,
    precision: str,
) -> Parity:
    """Returns how far each graph in the bundle's `folder` is from torch.

    Args:
        model: Torch's side.
        graphs: vision, text and pool.
        decoder: The decoder.
        folder: Holds their files.
        precision: `fp32` or `fp16`; decides the tolerances.
    """
    inputs = Inputs.of(model.config)
    dtype = np.dtype(graphs["vision"].inputs[0].dtype)
    with torch.no_grad():
        pairs = dict(_stages(model, graphs, decoder, folder, inputs, dtype))
    stages = (Stage.of(name, *pair, precision=precision) for name, pair in pairs.items())
    return Parity(precision, tuple(stages))


def _stages(
    model: PPLLaVA,
    graphs: Mapping[str, GraphSpec],
    decoder: DecoderSpec,
    folder: Path,
    inputs: Inputs,
    dtype: np.dtype[Any],
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Yields (stage, (got, expected))."""
    config, projector = model.config, model.multi_modal_projector

    def rounded(value: Tensor | Array) -> Array:
        return np.asarray(value).astype(dtype)

    def torch_of(value: Array) -> Tensor:
        return torch.from_numpy(value.astype(np.float32))

    pixel_values = rounded(inputs.pixel_values)
    tokens = model.vision_tower.vision_model(torch_of(pixel_values))
    keys, hidden = projector.keys(tokens), projector.hidden(tokens)
    with vision_with_tokens(graphs["vision"], folder, config) as engine:
        got = engine.run({"pixel_values": pixel_values})
    yield VISION_TOKENS, (got[VISION_TOKENS], tokens.numpy())
    yield "keys", (got["keys"], keys.numpy())
    yield "hidden", (got["hidden"], hidden.numpy())

    text_embed = projector.text_embed(torch.from_numpy(inputs.question_ids))
    got = _engine(graphs["text"], folder).run({"input_ids": inputs.question_ids})
    yield "text_embed", (got["text_embed"], text_embed.numpy())

    feeds = {name: rounded(value) for name, value in (("keys", keys), ("hidden", hidden))}
    feeds["text_embed"] = rounded(text_embed)
    window = {"kernel": np.array(config.kernel), "stride": np.array(config.stride)}
    got = _engine(graphs["pool"], folder).run(feeds | window)
    keys, hidden, text_embed = (torch_of(feed) for feed in feeds.values())
    relevance = (keys @ text_embed[0]).view(got["relevance"].shape)
    yield "relevance", (got["relevance"], relevance.numpy())
    # From the graph's own relevance: a sharp map and a small temperature magnify its last bits,
    # which were compared above.
    pooled = strided_weighted_pool(
        hidden.view(-1, *config.grid, config.decoder_width),
        token_weights(torch_of(got["relevance"]), projector.logit_scale),
        config.kernel,
        config.stride,
        config.temperature,
    )
    pooled = projector.linear_2(pooled)
    yield "pooled", (got["pooled"], pooled.numpy())

    table = np.load(folder / decoder.embedding, mmap_mode="r")
    before, after = np.split(table[inputs.prompt_ids], 2)
    embeds = np.concatenate([before, rounded(pooled), after])[None]
    embeds = embeds[:, -decoder.max_positions :]
    with streamed_fp32(model.language_model):
        output = model.language_model(inputs_embeds=torch_of(embeds), logits_to_keep=1)
    yield "logits", (_last_logits(folder, decoder, embeds), output.logits[:, -1].float().numpy())


def _engine(spec: GraphSpec, folder: Path) -> Engine:
    return open_engine(folder / spec.path, spec)


@contextmanager
def vision_with_tokens(spec: GraphSpec, folder: Path, config: ModelConfig) -> Iterator[Engine]:
    """Yields the vision graph with one output more: the patch tokens (T, L, C) inside it."""
    graph = folder / spec.path
    copy = graph.with_name(f"{graph.stem}_with_tokens.onnx")  # beside its external weights
    proto = onnx.load(str(graph), load_external_data=False)
    height, width = config.grid
    shape = ("T", height * width, config.vision.encoder.hidden_size)
    extra = TensorSpec(VISION_TOKENS, spec.outputs[0].dtype, shape)
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(extra.dtype))
    proto.graph.output.append(onnx.helper.make_tensor_value_info(VISION_TOKENS, element, shape))
    try:
        copy.write_bytes(proto.SerializeToString())
        yield _engine(GraphSpec(copy.name, spec.inputs, (*spec.outputs, extra)), graph.parent)
    finally:
        copy.unlink(missing_ok=True)


def _last_logits(folder: Path, decoder: DecoderSpec, embeds: Array) -> Array:
    """Returns the logits (1, V) after the prompt: prefilled but for one token, which is a step.

    So the cache is part of what is compared.
    """
    session = open_session(folder / decoder.path)
    names = [output.name for output in session.get_outputs()]
    cache = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), np.dtype(decoder.dtype))
    past = {name: cache for name in names if name != "logits"}
    for end, part in ((embeds.shape[1] - 1, embeds[:, :-1]), (embeds.shape[1], embeds[:, -1:])):
        feeds = {name.replace("present", "past_key_values"): past[name] for name in past}
        feeds["inputs_embeds"] = part
        feeds["attention_mask"] = np.ones((1, end), np.int64)
        past = dict(zip(names, session.run(names, feeds), strict=True))
        logits: Array = past.pop("logits")
    return logits[:, -1]


@contextmanager
def streamed_fp32(language_model: LlamaForCausalLM) -> Iterator[None]:
    """Lets a decoder whose weights are mapped in half precision compute in fp32.

    Each module's weights are fp32 only while it runs: all at once they may not fit into memory.
    """

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored.pop(parameter)

    stored: dict[nn.Parameter, Tensor] = {}
    leaves = [part for part in language_model.modules() if not any(part.children())]
    hooks = [part.register_forward_pre_hook(widen) for part in leaves]
    hooks += [part.register_forward_hook(narrow) for part in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
