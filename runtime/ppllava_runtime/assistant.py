"""The whole story: a bundle is opened, a video is watched, a question is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import DEVICES, Engine
from ppllava_engines.errors import DataError, UsageError
from ppllava_engines.memory_layout import MemoryKind, MemoryLayout
from ppllava_runtime.answer import Answer, Stopwatch
from ppllava_runtime.arrays import load_array
from ppllava_runtime.asking import Asker, Options, Schema
from ppllava_runtime.constraint import Grammars
from ppllava_runtime.conversation import (
    Conversation,
    Cost,
    Turns,
    Video,
)
from ppllava_runtime.decoders import Constraint, Decoder
from ppllava_runtime.memories import MemoryStore, Source, Watched
from ppllava_runtime.memory import Kind, Memory
from ppllava_runtime.prompt import Prompt, PromptBuilder
from ppllava_runtime.recorder import Record, Recorder
from ppllava_runtime.video import ClipInfo, each_picture, read_still
from ppllava_runtime.watching import Progress, Seen, watch_clip, watch_pictures


class Assistant(Asker):
    """A model, ready to watch videos. Its graphs are loaded when they are first needed.

    Args:
        bundle: The exported model.
        threads: Threads that work on one operator; None is one per core.
        device: "cpu"; see `engine.DEVICES` for others.
        memory: What to keep of a video, see `MemoryLayout`: the more, the sooner its next answer
            begins.
        store: Where to keep what was watched, so that the same is not watched again; several
            assistants may share one.

    Raises:
        IncompatibleError: A bundle without the graphs for such a memory.
        UsageError: Another device, or a memory that it or the bundle has not.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        device: str = "cpu",
        memory: MemoryKind = "hidden",
        store: MemoryStore | None = None,
    ) -> None:
        if device not in DEVICES:
            raise UsageError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.threads = threads
        self.device = device
        self.layout = MemoryLayout.of(bundle.manifest, memory, device)
        self.store = store

    @staticmethod
    def open(
        path: str | Path,
        threads: int | None = None,
        device: str = "cpu",
        memory: MemoryKind = "hidden",
        store: MemoryStore | None = None,
    ) -> Assistant:
        """The assistant for the bundle in the folder `path`.

        Raises:
            DataError, IncompatibleError, NotFoundError: See `Bundle.open`.
            UsageError: A device that is not known, or a memory that it or the bundle has not.
        """
        return Assistant(Bundle.open(path), threads, device, memory, store)

    def load(self) -> Assistant:
        """This assistant, with all of its bundle opened: from then on the folder may change.

        (But on "tensorrt" a pooling window that was not built is left to the bundle's own graph,
        which is opened when the first such question comes.)

        Raises:
            DataError: Some file in the bundle is damaged.
            IncompatibleError: A bundle that was exported without tokenizers.
            NotFoundError: No plans were built for the device.
            UnavailableError: A package or the device is missing.
        """
        _ = self.prompts, self.vision, self.text, self.pool, self.weigh, self.newline, self.decoder
        return self

    def watch(
        self,
        path: str | Path,
        num_frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Progress | None = None,
    ) -> Video:
        """The video (or picture) in a file, looked at once and remembered for all questions.

        Args:
            path: The file.
            num_frames: Frames of a video to look at; None is what the model was trained with.
            start: First second of a video to look at; None is the first frame.
            end: Last second of a video to look at; None is the last frame.
            progress: Called with the number of frames encoded so far and of all.

        Raises:
            UsageError: More frames than the model takes, a span outside the video, or any of these
                for a picture; or outputs too large for float16, see `Recorder.encode`.
            DataError, NotFoundError, StorageError, UnavailableError: See `video.read_clip`.
        """
        path, stopwatch = Path(path), Stopwatch()
        asked = {"frames": num_frames, "start": start, "end": end}
        given = [name for name, value in asked.items() if value is not None]
        # NumPy's numbers are numbers too.
        num_frames = self._default_frames if num_frames is None else index(num_frames)
        start, end = (None if second is None else float(second) for second in (start, end))
        self._check_at_most("frames", num_frames)

        def see() -> tuple[Kind, Seen[Record]]:
            with stopwatch.time("decode"):
                still = read_still(path)
            if still is None:
                return "video", watch_clip(
                    path,
                    num_frames,
                    start,
                    end,
                    recorder_of=self._recorder,
                    model=self.model,
                    stopwatch=stopwatch,
                    progress=progress,
                )
            _refuse_for_picture(path, given)
            return "image", self._look_at([still], 1, stopwatch, progress)

        source = Source([path], (num_frames, start, end), self._seer)
        video = self._remember(source, see, stopwatch)
        if video.memory.kind == "image":
            _refuse_for_picture(path, given)
        return video

    def look(self, paths: Sequence[str | Path], progress: Progress | None = None) -> Video:
        """Several pictures, looked at together and remembered; one is seen as `watch` sees it.

        Args:
            paths: Their files.
            progress: Called with the number of pictures encoded so far and of all.

        Raises:
            UsageError: No picture, more than the model takes, or one path that is in no list.
            DataError, NotFoundError, StorageError: See `video.each_picture`.
        """
        stopwatch = Stopwatch()
        if isinstance(paths, str | PathLike):  # whose letters would be paths
            raise UsageError(f"look takes a list of paths, got {str(paths)!r}: put it in a list")
        if not paths:
            raise UsageError("there is no picture to look at")
        self._check_at_most("the number of pictures", len(paths))
        files = [Path(path) for path in paths]

        def see() -> tuple[Kind, Seen[Record]]:
            kind: Kind = "image" if len(files) == 1 else "images"
            return kind, self._look_at(each_picture(files), len(files), stopwatch, progress)

        # One picture is what `watch` makes of it, which takes no other numbers for a picture.
        source = Source(files, (self._default_frames, None, None), self._seer)
        video = self._remember(source, see, stopwatch)
        if video.memory.kind == "video":
            raise DataError(f"image {files[0]}: not an image, give a video alone")
        return video

    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer to a question about nothing to be seen; see `ask`."""
        return self.converse().answer(question, options)

    def converse(self, turns: Turns = "re-pool") -> Conversation:
        """Questions one after the other about nothing to be seen; see `Conversation`."""
        nothing = Watched(Memory.of_nothing(self.model), ClipInfo.of_stills(0))
        return Video(self, nothing, Cost(0, 0, Stopwatch())).converse(turns)

    @cached_property
    def vision(self) -> Engine:
        """pixel_values → what the layout keeps."""
        return self._engine(self.layout.vision)

    @cached_property
    def text(self) -> Engine:
        """input_ids → text_embed."""
        return self._engine("text")

    @cached_property
    def pool(self) -> Engine:
        """What the layout keeps, text_embed, kernel, stride → pooled, relevance."""
        return self._engine(self.layout.pool)

    @cached_property
    def weigh(self) -> Engine | None:
        """tokens, norms, text_embed → relevance, weights; None where `pool` does it all."""
        return self._engine(self.layout.weigh) if self.layout.weigh else None

    @cached_property
    def newline(self) -> NDArray[Any] | None:
        """(D,), the embedding that ends a row of a picture; None where the model has none."""
        name, graphs = self.bundle.manifest.image_newline, self.bundle.manifest.graphs
        if name is None:
            return None
        dtype = next(spec.dtype for spec in graphs["pool"].outputs if spec.name == "pooled")
        return load_array(self.bundle.file(name), dtype, (self.model.decoder_width,))

    @cached_property
    def decoder(self) -> Decoder:
        """Parts of a prompt → ids."""
        if self.device == "tensorrt":
            from ppllava_runtime.decoders.tensorrt import TensorRTDecoder

            return TensorRTDecoder(self.bundle)
        from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder

        return OnnxRuntimeDecoder.open(self.bundle, self.threads)

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Question → ids, ids → text."""
        return PromptBuilder.open(self.bundle)

    @cached_property
    def grammars(self) -> Grammars:
        """Schemas and expressions → constraints of answers."""
        manifest = self.bundle.manifest
        if not manifest.tokenizers:
            return Grammars.open(self.bundle)  # which says what is missing
        # Its file may have changed since it was loaded.
        tokenizer = self.prompts.decoder_json
        return Grammars(tokenizer, manifest.decoder.vocab_size, manifest.decoder.eos_token_ids)

    def constraint(self, json_schema: Schema | None, regex: str | None) -> Constraint | None:
        """What an answer's ids must keep to; None is nothing."""
        if json_schema is None and regex is None:
            return None
        return self.grammars.constraint(json_schema, regex)

    @cached_property
    def max_frames(self) -> int:
        """The most frames of a video, or pictures: of the model and of the plans there are."""
        most = self.model.max_frames
        return min(most, self.pool.limits["T"]) if self.device == "tensorrt" else most

    @property
    def _default_frames(self) -> int:
        return min(self.model.default_frames, self.max_frames)

    def _engine(self, name: str) -> Engine:
        return self.bundle.engine(name, device=self.device, threads=self.threads)

    @property
    def _seer(self) -> tuple[str, ...]:
        """By what something is seen: others make another memory of it."""
        return (self.bundle.manifest.seal, self.layout.kind, self.device)

    def _check_at_most(self, what: str, count: int) -> None:
        if count > self.model.max_frames:
            raise UsageError(
                f"{what} is {count}, but {self.model.name} takes at most {self.model.max_frames}"
            )
        if count > self.max_frames:
            raise UsageError(
                f"{what} is {count}, but the plans of {self.model.name} take at most "
                f"{self.max_frames}: run ppllava-build with more --frames"
            )

    def _recorder(self, num_rows: int, coupled: bool) -> Recorder:
        manifest = self.bundle.manifest
        return Recorder(self.vision, self.layout, manifest, num_rows, coupled)

    def _look_at(
        self,
        pictures: Iterable[tuple[NDArray[np.uint8], str | None]],
        count: int,
        stopwatch: Stopwatch,
        progress: Progress | None,
    ) -> Seen[Record]:
        return watch_pictures(
            pictures,
            count,
            recorder_of=self._recorder,
            model=self.model,
            stopwatch=stopwatch,
            tiled=self.newline is not None,
            progress=progress,
        )

    def _remember(
        self, source: Source, see: Callable[[], tuple[Kind, Seen[Record]]], stopwatch: Stopwatch
    ) -> Video:
        """What is in the store, or else what there is to see, which goes there."""
        store, key = self.store, None
        if store is not None:
            with stopwatch.time("decode"):
                key = source.key()
            if key is not None and (watched := store.get(key)) is not None:
                return Video(self, watched.of(source.paths), Cost(0, 0, stopwatch))
        kind, seen = see()
        info, thumbnails = seen.info, seen.thumbnails
        memory = Memory(
            kind, seen.arrays, self.model.grid, info.timestamps, thumbnails, seen.tiling
        )
        watched = Watched(memory, info, source.paths)
        if store is not None and key is not None and source.is_unchanged():
            store.put(key, watched)
        return Video(self, watched, Cost(info.num_decoded, seen.num_encoded, stopwatch))


def _refuse_for_picture(path: Path, given: Sequence[str]) -> None:
    if given:
        raise UsageError(
            f"image {path}: {', '.join(given)}: of no meaning for a picture, leave it out"
        )
