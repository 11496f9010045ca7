"""The one contract between export and runtime: what a bundle holds, and how one is read and made.

A bundle is a folder:

    manifest.json                 this file's Manifest, as JSON
    graphs/{vision,text,pool}.onnx        and .onnx.data beside them when the weights are large
    graphs/{pool_fp16,pool_int8,vision_tokens,weigh_tokens,pool_tokens}.onnx    for other memories
                                  of a video; their large weights are those of the three
    decoder/model.onnx            and its data
    decoder/prefill.onnx          for prompts, where there is one
    decoder/embedding.npy         the token embeddings, a (V,D) table to be memory-mapped
    image_newline.npy             ends each row of a still's tiles, (D,); where the model has one
    tokenizers/{decoder,text}.json
    samples.npz                   inputs for every graph and what torch made of them
    parity.json                   how far the graphs were from that when they were exported
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppllava_engines import strict_json
from ppllava_engines.errors import DataError, NotFoundError
from ppllava_engines.manifest import (
    FAMILIES,
    MANIFEST,
    SCHEMA_VERSION,
    DecoderSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    Pooling,
    Precision,
    TensorSpec,
    refuse_escape,
)
from ppllava_engines.staging import replaced_folder

if TYPE_CHECKING:
    from ppllava_engines.engine import Engine

__all__ = [
    "FAMILIES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "DecoderSpec",
    "FileSpec",
    "GraphSpec",
    "Manifest",
    "ModelSpec",
    "Pooling",
    "Precision",
    "TensorSpec",
    "hash_files",
    "new_bundle",
]

_KEYS = ("schema_version", "graphs", "decoder")  # of a manifest of any version

# Opening a bundle hashes files up to this size (some 20 ms) and checks only the size of larger
# ones, so that a bundle of many gigabytes opens as fast as a small one.
_QUICK_HASH_BYTES = 32 << 20


def hash_files(folder: Path) -> dict[str, FileSpec]:
    """Size and hash of every file below `folder` except the manifest, by relative path, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: FileSpec.of(path) for name, path in names.items() if name != MANIFEST}


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
            text = strict_json.read_text(path / MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{path} is not a bundle: it has no {MANIFEST}") from error
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
        refuse_escape(name)
        if name not in self.manifest.files:
            raise NotFoundError(f"bundle {self.path}: no file {name!r}")
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise DataError(f"bundle {self.path}: {name!r} is a link that leads out of the bundle")
        return path

    def engine(self, name: str, *, device: str = "cpu", threads: int | None = None) -> Engine:
        """The engine of the graph `name`, loaded anew at each call.

        Args:
            name: One of the manifest's graphs, e.g. "vision", "text" or "pool".
            device: "cpu"; "openvino", for the towers alone; or "tensorrt" for a GPU, where
                ppllava-build made plans of this bundle.
            threads: As in `engine.open_engine`; a GPU has no use for it.

        Raises:
            NotFoundError: The bundle has no such graph, or no plan for it.
            DataError, UnavailableError, UsageError: See `engine.open_engine`.
            IncompatibleError: The bundle's plans are for another machine.
        """
        from ppllava_engines.engine import open_engine

        graphs = self.manifest.graphs
        if name not in graphs:
            raise NotFoundError(
                f"bundle {self.path}: no graph {name!r}, there are {', '.join(sorted(graphs))}"
            )
        if device == "tensorrt":
            from ppllava_engines.tensorrt.engine import TensorRTEngine

            return TensorRTEngine.open(self, name)
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
    place, in one step. When the block fails, `out` is what it was before; when the process is
    killed, it is that or the new bundle, and what is left beside it is removed by the next one.
    Where the file system cannot swap two folders in one step, a killed process may leave none at
    `out`: the next one puts the old bundle back.

    Args:
        out: Where the bundle goes.
        overwrite: Whether a bundle that is there may be replaced.

    Raises:
        DataError: What the block made is not a bundle.
        StorageError: Writing failed, and `out` is what it was before; unless it says that the new
            bundle is in place: then only the folder above it could not be synced to the disk.
        UsageError: `out` is there already, and is no bundle or `overwrite` is false.
    """
    with replaced_folder(Path(out), overwrite, MANIFEST, _KEYS) as staging:
        yield staging
        Bundle.open(staging)
