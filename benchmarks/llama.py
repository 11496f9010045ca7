"""llama.cpp as a peer: its quantizations of given weights, each at its best settings."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

Logits = NDArray[np.float32]
# Takes ids and how many tokens came before them; returns the logits after the last.
Run = Callable[[list[int], int], Logits]

# Its numbers for the types of files, and their bits.
TYPES = {"Q4_0": (2, 4), "Q4_1": (3, 4), "Q4_K_M": (15, 4), "Q8_0": (7, 8)}
FLOATS = "floats"
_FLOATS = 0
_CAPACITY, _BATCH = 2048, 1024  # tokens


@dataclass(frozen=True)
class Settings:
    """What llama.cpp leaves to its user, of what changes its speed."""

    flash_attn: bool
    ubatch: int

    def __str__(self) -> str:
        return f"flash_attn {'on' if self.flash_attn else 'off'}, n_ubatch {self.ubatch}"


SETTINGS = tuple(Settings(flash, ubatch) for flash in (False, True) for ubatch in (512, 1024))


@dataclass(frozen=True)
class Tuned:
    """A model at the settings that are best for prompts, and at those that are best for steps."""

    read: Run
    step: Run
    for_prompts: Settings
    for_steps: Settings

    def __str__(self) -> str:
        if self.for_prompts == self.for_steps:
            return str(self.for_prompts)
        return f"prompts {self.for_prompts}; steps {self.for_steps}"


class LlamaCpp:
    """The library, which says nothing unless it fails."""

    def __init__(self) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self._silent = self.lib.llama_log_callback(lambda *_: None)
        self.lib.llama_log_set(self._silent, None)
        self.lib.llama_backend_init()

    def quantize(self, source: Path, folder: Path) -> None:
        """Writes `source` in each of TYPES below `folder`."""
        for kind, (number, _) in TYPES.items():
            self._convert(source, folder / f"{kind}.gguf", number)

    def to_floats(self, source: Path, path: Path) -> None:
        """Writes a quantized file as the floats that its numbers stand for."""
        self._convert(source, path, _FLOATS)

    def _convert(self, source: Path, path: Path, kind: int) -> None:
        options = self.lib.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = kind, True
        names = (str(source).encode(), str(path).encode())
        if self.lib.llama_model_quantize(*names, ctypes.byref(options)):
            raise SystemExit(f"{path.name}: llama.cpp could not make it of {source.name}")

    def tuned(
        self,
        path: Path,
        threads: int,
        prompt: list[int],
        steps: int,
        settings: Sequence[Settings] = SETTINGS,
    ) -> Tuned:
        """Returns a model at the best of `settings`, by a prompt and some steps at each of them."""
        model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params()
        )
        if not model:
            raise SystemExit(f"{path.name}: llama.cpp could not load it")
        contexts = {each: _Context(self.lib, model, each, threads) for each in settings}
        reading, stepping = dict.fromkeys(settings, 0.0), dict.fromkeys(settings, 0.0)
        for each, context in contexts.items() if len(settings) > 1 else ():
            context.run(prompt[:32], 0)  # warms up
            began = time.perf_counter()
            context.run(prompt, 0)
            middle = time.perf_counter()
            for step in range(steps):
                context.run([prompt[step]], len(prompt) + step)
            reading[each] = middle - began
            stepping[each] = time.perf_counter() - middle
        best = [min(settings, key=seconds.__getitem__) for seconds in (reading, stepping)]
        for each, context in contexts.items():
            if each not in best:
                context.close()
        for_prompts, for_steps = best
        return Tuned(contexts[for_prompts].run, contexts[for_steps].run, for_prompts, for_steps)


class _Context:
    """A model with a cache; both live as long as the process unless closed."""

    def __init__(self, lib: Any, model: Any, settings: Settings, threads: int) -> None:
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch = _CAPACITY, _BATCH
        options.n_ubatch = settings.ubatch
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if settings.flash_attn
            else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._lib = lib
        self._context = lib.llama_init_from_model(model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp made no context: {settings}")
        self._num_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def run(self, ids: list[int], length: int) -> Logits:
        """See Run."""
        lib = self._lib
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, length, -1)
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            tokens = (lib.llama_token * len(part))(*part)
            if lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(part))):
                raise SystemExit(f"llama.cpp could not run {len(part)} tokens after {length}")
        logits = lib.llama_get_logits_ith(self._context, -1)
        return np.array(np.ctypeslib.as_array(logits, (self._num_tokens,)))

    def close(self) -> None:
        """Frees the cache."""
        self._lib.llama_free(self._context)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Writes a model without a vocabulary for llama.cpp, in the floats that it has.

    Its rotation pairs other channels, which is nothing that random weights could tell.
    """
    gguf = importlib.import_module("gguf")
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        value = tensor.float() if tensor.dim() == 1 else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
