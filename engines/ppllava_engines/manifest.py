"""What a bundle says of itself: manifest.json as dataclasses, read strictly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from ppllava_engines.errors import DataError, IncompatibleError
from ppllava_engines.sealed_json import Format

if TYPE_CHECKING:
    from ppllava_engines.engine import Array

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
# A prefill graph rounds all rows of a run by their largest number. The first tokens of a sequence,
# which decoders make their landmarks, have some that are hundreds of times as large as any later
# one's, so they go through the other graph; as do runs too short to gain from this one.
ROWS_BEFORE_PREFILL = 8
FAMILIES = ("clip", "siglip")
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool")
_CHUNK_BYTES = 1 << 20

Axes = tuple[int, int, int]


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype and shape of one input or output.

    Attributes:
        name: As in the graph.
        dtype: A numpy name; a graph's is one of DTYPES (bfloat16 only of what stays on a device).
        shape: Per axis a fixed size or the name of a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} ({','.join(map(str, self.shape))})"

    @staticmethod
    def of(name: str, array: Array) -> TensorSpec:
        """The spec of an array, all axes fixed."""
        return TensorSpec(name, str(array.dtype), array.shape)

    def accepts(self, array: Array) -> bool:
        """Whether the array has this dtype, this rank and these fixed sizes."""
        return (
            str(array.dtype) == self.dtype  # numpy does not know bfloat16
            and array.ndim == len(self.shape)
            and all(
                size == axis
                for axis, size in zip(self.shape, array.shape, strict=True)
                if isinstance(axis, int)
            )
        )


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file in the bundle and the tensors that go in and come out.

    Raises:
        DataError: A dtype that is not one of DTYPES.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype not in DTYPES:
                raise DataError(
                    f"{self.path}: dtype of {spec.name} is {spec.dtype!r}, expected one of "
                    f"{', '.join(DTYPES)}"
                )


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """The language model: a KV-cached graph fed by embeddings, and the table of the tokens'.

    Attributes:
        path: The graph's file in the bundle.
        prefill: The file of a second graph of the same inputs and outputs, for runs of many tokens;
            None where `path` does those too.
        embedding: The token embeddings' file in the bundle: .npy, (vocab_size, width).
        vocab_size: Rows of the table and length of the logits, V.
        width: Length of one embedding, D.
        num_layers, num_kv_heads, head_dim: The cache is (1, num_kv_heads, positions, head_dim) for
            the key and for the value of each layer.
        max_positions: Most tokens of prompt and answer together.
        dtype: Of embeddings, cache and logits: float32 or float16. In a bf16 bundle float32, while
            the cache is bfloat16, as the graph says.
        eos_token_ids: Any of them ends an answer; none only in a bundle without tokenizers.
    """

    path: str
    prefill: str | None = None
    embedding: str
    vocab_size: int
    width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Pooling:
    """How a grid of tokens is pooled: an output size, and maybe the kernel or the stride.

    Attributes:
        output: Windows per axis (T, h, w).
        kernel: Extents of a window; None when they follow from the stride.
        stride: Steps between windows; None when they follow from the kernel or, without one, are
            the size of the grid divided by the output's.
    """

    output: Axes
    kernel: Axes | None = None
    stride: Axes | None = None

    def window(self, size: Axes) -> tuple[Axes, Axes]:
        """Returns (kernel, stride) for a grid of `size` tokens over (T, h, w).

        Raises:
            ValueError: No such windows fit into the grid.
        """
        (kt, st), (kh, sh), (kw, sw) = (self._axis(axis, size[axis]) for axis in range(3))
        return (kt, kh, kw), (st, sh, sw)

    def _axis(self, axis: int, size: int) -> tuple[int, int]:
        output = self.output[axis]
        if self.stride is not None:
            stride = self.stride[axis]
        elif self.kernel is None:
            stride = size // output
        else:  # a single window never moves
            stride = (size - self.kernel[axis]) // (output - 1) if output > 1 else size
        kernel = size - (output - 1) * stride if self.kernel is None else self.kernel[axis]
        if stride < 1 or not 1 <= kernel <= size or (size - kernel) // stride + 1 != output:
            raise ValueError(
                f"{output} windows of {kernel} tokens, {stride} apart, are not what fits into "
                f"{size} tokens of axis {'Thw'[axis]}"
            )
        return kernel, stride


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the runtime must know of the model to feed its graphs.

    Attributes:
        name: For people.
        family: "clip" or "siglip".
        image_size: Side S of the square frames, in pixels.
        grid: Patches (h,w) of a frame; L = h·w.
        vision_width, key_width, decoder_width: C, P and D.
        max_frames: Most frames of one video, T.
        frames_coupled: Whether a frame's tokens depend on the other frames (BT-Adapter).
        image_mean, image_std: Per RGB channel, of values in [0,1].
        kernel, stride: Default pooling over (T,h,w).
        image_kernel, image_stride: The same for still images.
        pooling: From what kernel and stride follow, when it is the number of windows that is fixed:
            they are then those of `default_frames`, and others of other T.
        temperature: τ of the pooling, fixed in the pool graph.
        image_grid_pinpoints: Sizes (height,width) in pixels to which a still may be enlarged and
            cut into tiles of S×S, multiples of S; none where stills are looked at in one piece.
        text_positions: Most tokens of the question for the text tower.
        text_bos_token_id, text_eos_token_id: Around the question for the text tower; a SigLIP tower
            has no begin token.
        text_pad_token_id: Fills the question up to exactly `text_positions`, as a SigLIP tower
            takes it; None where the text graph takes any length up to that.
        image_token_index: The decoder's id whose embedding the pooled tokens replace.
        chat_template: A turn's text with {question} in it, and where the visual tokens go
            "<image>" with a line break after it.
        next_turn_template: What follows the last id of an answer when there is one more question:
            the token that ends an answer, and that question's turn with {question} in it.
        default_frames: Frames chosen of a video unless the caller says otherwise.

    Raises:
        DataError: Pinpoints that are no multiples of the image size.
        IncompatibleError: A family that this release does not know.
    """

    name: str
    family: str = "clip"
    image_size: int
    grid: tuple[int, int]
    vision_width: int
    key_width: int
    decoder_width: int
    max_frames: int
    frames_coupled: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    image_kernel: tuple[int, int, int]
    image_stride: tuple[int, int, int]
    pooling: Pooling | None
    temperature: float
    text_positions: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    text_bos_token_id: int | None
    text_eos_token_id: int
    text_pad_token_id: int | None
    image_token_index: int
    chat_template: str
    next_turn_template: str
    default_frames: int

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise IncompatibleError(
                f"model {self.name}: family is {self.family!r}, expected {' or '.join(FAMILIES)}: "
                "use a newer release"
            )
        side = self.image_size
        for pair in self.image_grid_pinpoints:
            if any(side < 1 or size < 1 or size % side for size in pair):
                raise DataError(
                    f"model {self.name}: image_grid_pinpoints has {list(pair)}, expected multiples "
                    f"of its image_size {side}: export it again"
                )

    def video_window(self, size: Axes) -> tuple[Axes, Axes]:
        """Returns (kernel, stride) for a video of `size` tokens (T,h,w).

        Where the number of windows is fixed and the video is too small for so many, there are as
        many as there are tokens.
        """
        if self.pooling is None:
            return self.kernel, self.stride
        try:
            return self.pooling.window(size)
        except ValueError:
            t, h, w = map(min, self.pooling.output, size)
            return Pooling((t, h, w)).window(size)


@dataclass(frozen=True)
class Precision:
    """The types of a bundle's numbers.

    Attributes:
        dtype: Of the graphs' floats.
        vision: Of the vision graph's linear layers: "float"; "int8", rounded by what each run
            brings; or "int8-static", rounded by steps from a calibration.
        decoder: "float", or the type of the decoder's weights.
        prefill: "same", or "int8" where the decoder has a second graph for prompts.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    vision: Literal["float", "int8", "int8-static"] = "float"
    decoder: Literal["float", "int8", "int4"] = "float"
    prefill: Literal["same", "int8"] = "same"

    def __str__(self) -> str:
        parts: list[str] = [self.dtype]
        for name in ("vision", "decoder"):
            if (kind := getattr(self, name)) != "float":
                parts.append(f"{name} {kind}")
        if self.prefill != "same":
            parts.append(f"prefill {self.prefill}")
        return ", ".join(parts)


@dataclass(frozen=True)
class FileSpec:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileSpec:
        """The size and hash of the file at `path`."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return FileSpec(size, digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is said about a bundle.

    Attributes:
        schema_version: SCHEMA_VERSION of the release that wrote it.
        model, decoder: See there.
        graphs: "vision", "text" and "pool", and those for other memories of a video: "pool_fp16",
            "pool_int8", "vision_tokens", "weigh_tokens", "pool_tokens".
        precision: See there.
        tokenizers: The file of "decoder" and of "text".
        image_newline: The file of the embedding that ends each row of a still's tiles, in the dtype
            of `pooled`; None where the model has none.
        samples: The file of inputs and expected outputs, see `samples.Samples`.
        files: Every other file of the bundle, see `hash_files`.
        exporter: Package → version of what made the bundle.
        sources: SHA-256 of the weights it was made of: of the "checkpoint" and, where its alignment
            was replaced, of what `--clip` names (empty for random weights).

    Raises:
        DataError: A path that leaves the bundle, or one that `files` does not list.
    """

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    graphs: dict[str, GraphSpec]
    decoder: DecoderSpec
    precision: Precision
    tokenizers: dict[str, str]
    image_newline: str | None
    samples: str
    files: dict[str, FileSpec]
    exporter: dict[str, str]
    sources: dict[str, str]

    def __post_init__(self) -> None:
        for path in self.files:
            refuse_escape(path)
        named = [graph.path for graph in self.graphs.values()]
        named += [self.decoder.path, self.decoder.embedding, *self.tokenizers.values()]
        named += [
            self.samples,
            *(path for path in (self.image_newline, self.decoder.prefill) if path),
        ]
        unlisted = [path for path in named if path not in self.files]
        if unlisted:
            raise DataError(f"{MANIFEST}: files does not list {', '.join(map(repr, unlisted))}")

    @property
    def seal(self) -> str:
        """The hash by which it is sealed; another one is another bundle's."""
        return _format().seal_of(self)

    def to_json(self) -> str:
        """The text that `from_json` reads back to an equal manifest, sealed by its own hash."""
        return _format().dumps(self)

    @staticmethod
    def from_json(text: str, source: str = MANIFEST) -> Manifest:
        """The manifest of `text`; `source` names it in errors.

        Sealed, because a wrong special id or template breaks no file and no graph: only answers.

        Raises:
            DataError: Not JSON, a key or value that does not belong, which it names, or one that
                was changed since the export.
            IncompatibleError: Another schema version, or a family this release does not know.
        """
        return _format().loads(text, source)


def _format() -> Format[Manifest]:
    advice = "copy the bundle or export the checkpoint again"
    return Format(Manifest, SCHEMA_VERSION, "manifest_sha256", "the export", advice)


def refuse_escape(name: str) -> None:
    """Nothing, when `name` is a plain path that stays inside the bundle.

    Raises:
        DataError: It is not.
    """
    path = PurePosixPath(name)
    plain = name == str(path) and "\\" not in name and "\0" not in name and name != "."
    if not plain or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{json.dumps(name)} is not a plain path inside the bundle")
