"""The one contract between export and runtime: what a bundle holds, and how one is read and made.

A bundle is a folder:

    manifest.json                 this file's Manifest, as JSON
    graphs/{vision,text,pool}.onnx        and .onnx.data beside them when the weights are large
    decoder/model.onnx            and its data
    decoder/embedding.npy         the token embeddings, a (V,D) table to be memory-mapped
    tokenizers/{decoder,text}.json
    parity.json                   torch against every graph, as measured at export
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError
from ppllava_engines.staging import replaced_folder

if TYPE_CHECKING:
    from ppllava_engines.engine import Engine

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_KEYS = ("schema_version", "graphs", "decoder")  # of a manifest of any version
FAMILIES = ("clip",)
DTYPES = ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")

# Opening a bundle hashes files up to this size (some 20 ms) and checks only the size of larger
# ones, so that a bundle of many gigabytes opens as fast as a small one.
_QUICK_HASH_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype and shape of one input or output.

    Attributes:
        name: As in the graph.
        dtype: A numpy name; a graph's is one of DTYPES.
        shape: Per axis a fixed size or the name of a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} ({','.join(map(str, self.shape))})"

    @staticmethod
    def of(name: str, array: NDArray[Any]) -> TensorSpec:
        """The spec of an array, all axes fixed."""
        return TensorSpec(name, str(array.dtype), array.shape)

    def accepts(self, array: NDArray[Any]) -> bool:
        """Whether the array has this dtype, this rank and these fixed sizes."""
        return (
            array.dtype == np.dtype(self.dtype)
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
        embedding: The token embeddings' file in the bundle: .npy, (vocab_size, width).
        vocab_size: Rows of the table and length of the logits, V.
        width: Length of one embedding, D.
        num_layers, num_kv_heads, head_dim: The cache is (1, num_kv_heads, positions, head_dim) for
            the key and for the value of each layer.
        max_positions: Most tokens of prompt and answer together.
        dtype: Of embeddings, cache and logits: float32 or float16.
        eos_token_ids: Any of them ends an answer.
    """

    path: str
    embedding: str
    vocab_size: int
    width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the runtime must know of the model to feed its graphs.

    Attributes:
        name: For people.
        family: "clip".
        image_size: Side S of the square frames, in pixels.
        grid: Patches (h,w) of a frame; L = h·w.
        vision_width, key_width, decoder_width: C, P and D.
        max_frames: Most frames of one video, T.
        frames_coupled: Whether a frame's tokens depend on the other frames.
        image_mean, image_std: Per RGB channel, of values in [0,1].
        kernel, stride: Default pooling over (T,h,w).
        image_kernel, image_stride: The same for still images.
        temperature: τ of the pooling, fixed in the pool graph.
        text_positions: Most tokens of the question for the text tower.
        text_bos_token_id, text_eos_token_id: Around the question for the text tower.
        image_token_index: The decoder's id whose embedding the pooled tokens replace.
        chat_template: A format string with {question}.
        default_frames: Frames chosen of a video unless the caller says otherwise.

    Raises:
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
    temperature: float
    text_positions: int
    text_bos_token_id: int
    text_eos_token_id: int
    image_token_index: int
    chat_template: str
    default_frames: int

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise IncompatibleError(
                f"model {self.name}: family is {self.family!r}, expected {' or '.join(FAMILIES)}: "
                "use a newer release"
            )


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


def hash_files(folder: Path) -> dict[str, FileSpec]:
    """Size and hash of every file below `folder` except the manifest, by relative path, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: FileSpec.of(path) for name, path in names.items() if name != MANIFEST}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is said about a bundle.

    Attributes:
        schema_version: SCHEMA_VERSION of the release that wrote it.
        model, decoder: See there.
        graphs: "vision", "text" and "pool".
        precision: "fp32" or "fp16".
        tokenizers: The file of "decoder" and of "text".
        files: Every other file of the bundle, see `hash_files`.
        exporter: Package → version of what made the bundle.
        source_sha256: Hash of the checkpoint's weights.

    Raises:
        DataError: A path that leaves the bundle, or one that `files` does not list.
    """

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    graphs: dict[str, GraphSpec]
    decoder: DecoderSpec
    precision: str
    tokenizers: dict[str, str]
    files: dict[str, FileSpec]
    exporter: dict[str, str]
    source_sha256: str

    def __post_init__(self) -> None:
        for path in self.files:
            _refuse_escape(path)
        named = [graph.path for graph in self.graphs.values()]
        named += [self.decoder.path, self.decoder.embedding, *self.tokenizers.values()]
        unlisted = [path for path in named if path not in self.files]
        if unlisted:
            raise DataError(f"{MANIFEST}: files does not list {', '.join(map(repr, unlisted))}")

    def to_json(self) -> str:
        """The text that `from_json` reads back to an equal manifest."""
        return strict_json.dumps(self)

    @staticmethod
    def from_json(text: str, source: str = MANIFEST) -> Manifest:
        """The manifest of `text`; `source` names it in errors.

        Raises:
            DataError: Not JSON, or a key or value that does not belong; names it.
            IncompatibleError: Another schema version, or a family this release does not know.
        """
        value = strict_json.loads(text, source)
        # The version comes first: of another one, nothing else is known.
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is int and version != SCHEMA_VERSION:
            raise IncompatibleError(
                f"{source}: schema_version is {version}, this release reads {SCHEMA_VERSION}: "
                "export the checkpoint again"
            )
        return strict_json.decode(Manifest, value, source)


@dataclass(frozen=True)
class Bundle:
    """A bundle on this machine; `Bundle.open` makes one.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path, verify: Literal["quick", "full"] = "quick") -> Bundle:
        """The bundle in the folder `path`, after its files were checked.

        Args:
            path: The folder.
            verify: "quick" checks every size, and the hash of files up to 32 MiB; "full" checks
                every hash.

        Raises:
            DataError: No bundle, a manifest that is not understood, or a file that is missing or
                not the one that was exported.
            IncompatibleError: A bundle of another schema version or an unknown family.
            NotFoundError: There is no such folder.
        """
        path = Path(path)
        if not path.exists():
            raise NotFoundError(f"bundle {path}: no such folder")
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{path} is not a bundle: it has no {MANIFEST}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path / MANIFEST}: not UTF-8: {error}") from error
        bundle = Bundle(path, Manifest.from_json(text, source=str(path / MANIFEST)))
        for name, expected in bundle.manifest.files.items():
            bundle._check(name, expected, quick=verify == "quick")
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files, given its name relative to the bundle.

        Raises:
            DataError: A name that leads out of the bundle.
            NotFoundError: A name that the manifest does not list.
        """
        _refuse_escape(name)
        if name not in self.manifest.files:
            raise NotFoundError(f"bundle {self.path}: no file {name!r}")
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise DataError(f"bundle {self.path}: {name!r} is a link that leads out of the bundle")
        return path

    def engine(self, name: str, *, device: str = "cpu", threads: int | None = None) -> Engine:
        """The engine of the graph `name`, loaded anew at each call.

        Raises:
            NotFoundError: The bundle has no such graph.
            DataError, UnavailableError, UsageError: See `engine.open_engine`.
        """
        from ppllava_engines.engine import open_engine

        graphs = self.manifest.graphs
        if name not in graphs:
            raise NotFoundError(
                f"bundle {self.path}: no graph {name!r}, there are {', '.join(sorted(graphs))}"
            )
        return open_engine(self.file(graphs[name].path), graphs[name], device, threads)

    def _check(self, name: str, expected: FileSpec, *, quick: bool) -> None:
        path = self.file(name)
        advice = "copy the bundle or export the checkpoint again"
        if not path.is_file():
            raise DataError(f"bundle {self.path}: file {name} is missing: {advice}")
        size = path.stat().st_size
        if size != expected.size:
            raise DataError(
                f"bundle {self.path}: {name} has {size} bytes, expected {expected.size}: {advice}"
            )
        if quick and size > _QUICK_HASH_BYTES:
            return
        sha256 = FileSpec.of(path).sha256
        if sha256 != expected.sha256:
            raise DataError(
                f"bundle {self.path}: {name} is damaged, its sha256 is {sha256[:12]}…, expected "
                f"{expected.sha256[:12]}…: {advice}"
            )


@contextmanager
def new_bundle(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A staging folder beside `out` that becomes the bundle `out` when the block ends well.

    The block fills the folder, the manifest included; it is opened as a bundle before it is put in
    place, in one step. When the block fails, or the process is killed, `out` is what it was before;
    what a killed process left is removed by the next one.

    Args:
        out: Where the bundle goes.
        overwrite: Whether a bundle that is there may be replaced.

    Raises:
        DataError: What the block made is not a bundle.
        StorageError: Writing failed.
        UsageError: `out` is there already, and is no bundle or `overwrite` is false.
    """
    with replaced_folder(Path(out), overwrite, MANIFEST, _KEYS) as staging:
        yield staging
        Bundle.open(staging)


def _refuse_escape(name: str) -> None:
    path = PurePosixPath(name)
    plain = name == str(path) and "\\" not in name and "\0" not in name and name != "."
    if not plain or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{json.dumps(name)} is not a plain path inside the bundle")
