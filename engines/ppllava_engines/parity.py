"""Torch against a bundle's graphs, stage by stage: samples that any backend can replay.

The exporter stores what torch was given and what it answered. Each stage is fed the stored inputs,
rounded to the graph's own types when they were stored, so that a stage's numbers are its own and
not those of the stages before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines import strict_json
from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import open_engine
from ppllava_engines.errors import DataError, IncompatibleError, InternalError
from ppllava_engines.manifest import ROWS_BEFORE_PREFILL
from ppllava_engines.memory_parity import replay_memories
from ppllava_engines.samples import Samples, prompt_embeds

if TYPE_CHECKING:
    from rich.table import Table

    from ppllava_engines.manifest import DecoderSpec, GraphSpec, ModelSpec, Precision

Array = NDArray[Any]

PARITY = "parity.json"
STAGES = ("keys", "hidden", "text_embed", "relevance", "pooled", "logits")
PREFILL_STAGE = "logits_prefill"
_TOWER_STAGES = STAGES[:3]

# Largest error allowed, as a share of the largest magnitude expected. A type rounds to 6e-8, 5e-4
# and 4e-3 once; towers and decoder add up many roundings.
_TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2}
# Quantised parts move every value a little, the largest no more than others: what must stay is the
# direction.
_VISION_COSINES = {"int8": 0.98, "int8-static": 0.98}
_DECODER_COSINES = {"int8": 0.99, "int4": 0.90}
# Of which the prefill graph rounds what it multiplies as well.
_PREFILL_COSINES = {"int8": 0.98, "int4": 0.90}
_INT8_MEMORY_COSINE = 0.99
# Of one value in float16. In a float16 memory each of the P products of a relevance has one such.
_HALF_ROUNDING = 2.0**-11
# Of one product in fp32, with some room: errors of P products add up like the root of P.
_ROUNDING = 2.0**-22


@dataclass(frozen=True)
class Stage:
    """One stage's distance from torch.

    Attributes:
        name: One of STAGES or MEMORY_STAGES, or PREFILL_STAGE.
        shape: Of the values compared.
        max_error: Largest absolute difference over the largest magnitude expected.
        cosine: Between the two, flattened.
        tolerance: What `max_error` may be; None where the stage is held to its cosine.
        min_cosine: What `cosine` must be; None where the stage is held to its error.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float
    cosine: float
    tolerance: float | None
    min_cosine: float | None = None

    @staticmethod
    def of(
        name: str,
        got: Array,
        expected: Array,
        *,
        tolerance: float | None = None,
        min_cosine: float | None = None,
    ) -> Stage:
        """Returns the distance between two arrays; what is not finite is infinitely far.

        Raises:
            InternalError: The shapes differ.
        """
        if got.shape != expected.shape:
            raise InternalError(f"parity {name}: graph gives {got.shape}, torch {expected.shape}")
        a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        peak, norms = float(np.abs(b).max(initial=0)), math.sqrt((a @ a) * (b @ b))
        # NaN and infinities have no place in JSON, so what is not finite is named by its size.
        finite = bool(np.isfinite(a).all() and np.isfinite(b).all() and peak > 0 and norms > 0)
        error = float(np.abs(a - b).max() / peak) if finite else float(np.finfo(np.float64).max)
        cosine = float(a @ b / norms) if finite else 0.0
        return Stage(name, got.shape, error, cosine, tolerance, min_cosine)

    @property
    def passed(self) -> bool:
        """Whether the stage is within its limits."""
        near = self.tolerance is None or self.max_error <= self.tolerance
        return near and (self.min_cosine is None or self.cosine >= self.min_cosine)

    @property
    def limit(self) -> str:
        """What the stage is held to, for people."""
        limits = []
        if self.tolerance is not None:
            limits.append(f"error ≤ {self.tolerance:.0e}")
        if self.min_cosine is not None:
            limits.append(f"cosine ≥ {self.min_cosine:g}")
        return ", ".join(limits)

    def __str__(self) -> str:
        return f"{self.name}: max error {self.max_error:.1e}, cosine {self.cosine:.5f}"


def replay(
    folder: Path,
    samples: Samples,
    *,
    model: ModelSpec,
    graphs: Mapping[str, GraphSpec],
    decoder: DecoderSpec,
    precision: Precision,
    device: str = "cpu",
    threads: int | None = None,
    lean: bool = False,
) -> Iterator[Stage]:
    """Yields each stage's distance from torch, in the order of STAGES, as it is computed.

    On a CPU the logits by way of a prefill graph follow, and those of MEMORY_STAGES, as far as the
    bundle has graphs for them. One graph is loaded at a
    time.

    Args:
        folder: Holds the files of `graphs` and `decoder`; for "tensorrt" it is a bundle with plans.
        samples: Of the same export.
        model: Says how frames are normalised.
        graphs: vision, text and pool, and those for other memories.
        decoder: The decoder.
        precision: Decides the limits.
        device: As in `Bundle.engine`.
        threads: The same.
        lean: Whether float weights stay mapped from their files, which is slower; see
            `onnxruntime.open_session`. Quantized graphs run as ever: unfused, their weights would
            all be widened first.

    Raises:
        DataError: A graph that is damaged, or that does not take the samples.
        IncompatibleError: A graph of a type that the device does not compute in.
        InternalError: A graph failed, or answers in another shape than torch.
        UnavailableError: The device, or the package for it, is missing.
    """

    def run(name: str, **feeds: Array) -> dict[str, Array]:
        if device == "tensorrt":
            return Bundle.open(folder).engine(name, device=device).run(feeds)
        spec = graphs[name]
        # Those of tokens are parts of the vision graph.
        quantized = precision.vision != "float" and (name == "vision" or "tokens" in name)
        mapped = lean and not quantized
        engine = open_engine(folder / spec.path, spec, device, threads, lean=mapped)
        return engine.run(feeds)

    towers = _precision_of_towers(precision, device)

    def stage(name: str, got: Array) -> Stage:
        limits = _limits(name, towers if name in _TOWER_STAGES else precision, samples)
        return Stage.of(name, got, getattr(samples, name), **limits)

    dtype = graphs["vision"].inputs[0].dtype
    got = run("vision", pixel_values=samples.pixel_values(model, dtype))
    yield stage("keys", got["keys"])
    yield stage("hidden", got["hidden"])
    got = run("text", input_ids=samples.text_ids)
    yield stage("text_embed", got["text_embed"])
    pooling = ("keys", "hidden", "text_embed", "kernel", "stride")
    got = run("pool", **{name: getattr(samples, name) for name in pooling})
    yield stage("relevance", got["relevance"])
    yield stage("pooled", got["pooled"])
    del got
    prompt = (samples.prompt_before, samples.pooled, samples.prompt_after)
    embeds = prompt_embeds(folder / decoder.embedding, decoder.max_positions, *prompt)
    lean_decoder = lean and precision.decoder == "float"
    if device == "tensorrt":
        logits = _last_logits_of_plans(folder, embeds)
    else:
        logits = _last_logits(folder, decoder, embeds, [decoder.path], threads, lean_decoder)
    yield stage("logits", logits)
    if device != "tensorrt":
        if decoder.prefill:
            paths = [decoder.path, decoder.prefill]
            logits = _last_logits(folder, decoder, embeds, paths, threads, lean_decoder)
            limit = _PREFILL_COSINES[precision.decoder]
            yield Stage.of(PREFILL_STAGE, logits, samples.logits, min_cosine=limit)
        for name, made, expected in replay_memories(run, samples, model, graphs, dtype):
            yield Stage.of(name, made, expected, **_memory_limits(name, towers, samples))


def _precision_of_towers(precision: Precision, device: str) -> Precision:
    """Returns what the towers are held to: OpenVINO may compute in less than its graphs' type."""
    if device != "openvino":
        return precision
    from ppllava_engines.openvino import compute_dtype

    return replace(precision, dtype="bf16") if compute_dtype() == "bf16" else precision


def _limits(name: str, precision: Precision, samples: Samples) -> dict[str, float]:
    """Returns what a stage is held to, as arguments of `Stage.of`."""
    if precision.vision != "float" and name in ("keys", "hidden"):
        return {"min_cosine": _VISION_COSINES[precision.vision]}
    if precision.decoder != "float" and name == "logits":
        return {"min_cosine": _DECODER_COSINES[precision.decoder]}
    tolerance = _TOLERANCES[precision.dtype]
    if name == "pooled":
        # The relevance is fp32 in every precision; a sharp map and a small temperature magnify
        # its last bits.
        rounding = _ROUNDING * samples.keys.shape[-1] ** 0.5
        tolerance += rounding * float(samples.gain)
    return {"tolerance": tolerance}


def _memory_limits(name: str, precision: Precision, samples: Samples) -> dict[str, float]:
    """The same of a stage of another memory."""
    if name == "pooled_int8":
        return {"min_cosine": _INT8_MEMORY_COSINE}
    if precision.vision != "float" and name != "pooled_fp16":
        return {"min_cosine": _VISION_COSINES[precision.vision]}
    tolerance = max(_TOLERANCES["fp16"], _TOLERANCES[precision.dtype])
    if name.startswith("pooled"):
        # Products are of the size 1 / P, and their errors add up like the root of P.
        tolerance += _HALF_ROUNDING / samples.keys.shape[-1] ** 0.5 * float(samples.gain)
    return {"tolerance": tolerance}


def _last_logits(
    folder: Path,
    decoder: DecoderSpec,
    embeds: Array,
    paths: Sequence[str],
    threads: int | None,
    lean: bool,
) -> Array:
    """Returns the logits (1, V) after the prompt: prefilled but for one token, which is a step.

    So the cache is part of what is compared. All is done by the first of `paths` but, where there
    is a second, the part of the prompt that the runtime leaves to that one.
    """
    from ppllava_engines.onnxruntime import open_session

    length = embeds.shape[1]
    sessions = [open_session(folder / path, threads, lean=lean) for path in paths]
    session = sessions[0]
    ends = [(session, length - 1), (session, length)]
    if len(sessions) > 1 and length - 1 > ROWS_BEFORE_PREFILL:
        ends[:1] = [(session, ROWS_BEFORE_PREFILL), (sessions[1], length - 1)]
    names = [output.name for output in session.get_outputs()]
    cache = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), np.dtype(decoder.dtype))
    past = {name: cache for name in names if name != "logits"}
    begin = 0
    for session, end in ends:
        feeds = {name.replace("present", "past_key_values"): past[name] for name in past}
        feeds["inputs_embeds"] = embeds[:, begin:end]
        feeds["attention_mask"] = np.ones((1, end), np.int64)
        try:
            past = dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:  # ORT's exceptions share no base class
            raise InternalError(f"decoder: ONNX Runtime failed: {error}") from error
        logits: Array = past.pop("logits")
        begin = end
    return logits[:, -1]


def _last_logits_of_plans(folder: Path, embeds: Array) -> Array:
    """The same on a GPU, by the bundle's plan."""
    from ppllava_engines.tensorrt.cache import CachedDecoder

    cache = CachedDecoder.open(Bundle.open(folder)).cache(embeds.shape[1])
    cache.run(embeds[0, :-1], 0)
    return cache.run(embeds[0, -1:], embeds.shape[1] - 1)[None]


@dataclass(frozen=True)
class Parity:
    """Every stage of one bundle, as measured on one backend.

    Attributes:
        precision: The bundle's, for people: of an int8 vision graph also how much of it is int8.
        backend: What the graphs ran on.
        stages: In the order of STAGES.
    """

    precision: str
    backend: str
    stages: tuple[Stage, ...]

    def require(self) -> None:
        """Returns nothing when every stage is within its limits.

        Raises:
            IncompatibleError: Only quantized stages are not: the model does not bear it.
            InternalError: Another is not; either names each with its numbers.
        """
        failed = [stage for stage in self.stages if not stage.passed]
        if not failed:
            return
        sentence = (
            f"{self.precision} graphs are too far from torch, so no bundle is made: "
            f"{'; '.join(f'{stage} (expected {stage.limit})' for stage in failed)}; errors are "
            "shares of the largest magnitude expected"
        )
        if any(stage.min_cosine is None or stage.cosine <= 0 for stage in failed):
            raise InternalError(sentence)
        raise IncompatibleError(
            f"{sentence}: calibrate on more videos like those to come, or quantize less"
        )

    def write(self, folder: Path) -> None:
        """Writes `folder`/parity.json."""
        (folder / PARITY).write_text(strict_json.dumps(self), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Parity:
        """Returns the report in a bundle's folder.

        Raises:
            DataError: It is not a report.
        """
        path = folder / PARITY
        try:
            text = strict_json.read_text(path)
        except OSError as error:
            raise DataError(f"{path}: no report of an export: {error}") from error
        return strict_json.decode(Parity, strict_json.loads(text, str(path)), str(path))

    def table(self) -> Table:
        """Returns the report for a terminal."""
        from rich.table import Table

        title = f"parity with torch, {self.precision}, on {self.backend}"
        table = Table("stage", "shape", title=title)
        for heading in ("max error / max", "1 − cosine", "limit"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            table.add_row(
                stage.name,
                "×".join(map(str, stage.shape)),
                f"{stage.max_error:.1e}",
                f"{max(0.0, 1 - stage.cosine):.1e}",
                stage.limit,
                style=None if stage.passed else "red",
            )
        return table
