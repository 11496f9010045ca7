"""The whole story: a bundle is opened, a video is watched, a question is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from functools import partial
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
from ppllava_runtime.conversation import Conversation, Cost, Turns, Video
from ppllava_runtime.decoders import Constraint, Decoder
from ppllava_runtime.lane import Lane, LanedEngine, LoadedOnce
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.local import LOCAL
from ppllava_runtime.memories import MemoryStore, Source, Watched
from ppllava_runtime.memory import Kind, Memory
from ppllava_runtime.prompt import Prompt, PromptBuilder
from ppllava_runtime.recorder import Record, Recorder
from ppllava_runtime.video import ClipInfo, Sample, check_file, each_picture
from ppllava_runtime.watching import (
    ClipFrames,
    Opener,
    PictureFrames,
    Progress,
    Seen,
    watch_clip,
    watch_pictures,
)


class Assistant(Asker):
    """A model, ready to watch videos. Its graphs are loaded when they are first needed.

    Several threads may use one: on its device they take turns, run by run, in the order of asking.

    Args:
        bundle: The exported model.
        threads: Threads that work on one operator; None is one per core.
        device: "cpu"; see `engine.DEVICES` for others.
        memory: What to keep of a video, see `MemoryLayout`: the more, the sooner its next answer
            begins.
        store: Where to keep what was watched, so that the same is not watched again, nor by two at
            once; several assistants may share one.
        decoding: Reads the files; LOCAL does it here, which is for those that one trusts.

    Attributes:
        lane: In which whatever uses the device does so.

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
        decoding: Opener = LOCAL,
    ) -> None:
        if device not in DEVICES:
            raise UsageError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.threads = threads
        self.device = device
        self.layout = MemoryLayout.of(bundle.manifest, memory, device)
        self.store = store
        self.decoding = decoding
        self.lane = Lane()

    @staticmethod
    def open(
        path: str | Path,
        threads: int | None = None,
        device: str = "cpu",
        memory: MemoryKind = "hidden",
        store: MemoryStore | None = None,
        decoding: Opener = LOCAL,
    ) -> Assistant:
        """The assistant for the bundle in the folder `path`.

        Raises:
            DataError, IncompatibleError, NotFoundError: See `Bundle.open`.
            UsageError: A device that is not known, or a memory that it or the bundle has not.
        """
        return Assistant(Bundle.open(path), threads, device, memory, store, decoding)

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
        *,
        fps: float | None = None,
        owner: str = "",
        leaving: Leaving | None = None,
    ) -> Video:
        """The video (or picture) in a file, looked at once and remembered for all questions.

        Args:
            path: The file.
            num_frames: Frames of a video to look at; None is what the model was trained with. With
                `fps` it is the most.
            start: First second of a video to look at; None is the first frame.
            end: Last second of a video to look at; None is the last frame.
            progress: Called with the number of frames encoded so far and of all; what it raises
                ends the watching.
            fps: Instead of a number of frames, so many per second, as far as the model takes them.
            owner: For whom; what was seen for others is not found in the store.
            leaving: Ends it when nobody waits for it any more: sooner than `progress` could.

        Raises:
            UsageError: More frames than the model takes, a span outside the video, or any of these
                for a picture; or outputs too large for float16, see `Recorder.encode`.
            DataError, NotFoundError, StorageError, UnavailableError: See `video.read_clip`.
            Left: Nobody waits for it any more.
        """
        path, stopwatch, stay = Path(path), Stopwatch(), leaving or Leaving()
        asked = {"frames": num_frames, "fps": fps, "start": start, "end": end}
        given = [name for name, value in asked.items() if value is not None]
        # NumPy's numbers are numbers too.
        count = None if num_frames is None else index(num_frames)
        rate, begin, stop = (None if v is None else float(v) for v in (fps, start, end))
        if count is None and rate is None:
            count = self._default_frames
        if count is not None:
            self._check_at_most("frames", count)
        sample = Sample(count, rate, begin, stop, None if rate is None else self.max_frames)

        def see(told: Progress) -> tuple[Kind, Seen[Record]]:
            with stopwatch.time("decode"):
                check_file(path)
                still = self.decoding.still(path, stay)
            if still is None:
                frames = self.decoding.clip(path, sample, self.model.image_size, stay)
                return "video", self._watch(frames, stopwatch, told)
            _refuse_for_picture(path, given)
            return "image", self._look_at([still], 1, stopwatch, told)

        source = Source([path], astuple(sample), self._seer, owner)
        video = self._remember(source, see, stopwatch, progress, stay)
        if video.memory.kind == "image":
            _refuse_for_picture(path, given)
        return video

    def look(
        self,
        paths: Sequence[str | Path],
        progress: Progress | None = None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        owner: str = "",
        leaving: Leaving | None = None,
    ) -> Video:
        """Several pictures, looked at together and remembered; one is seen as `watch` sees it.

        Args:
            paths: Their files.
            progress: Called with the number of pictures encoded so far and of all; what it raises
                ends the looking.
            fps: Makes them the frames of a video: so many are a second.
            num_frames: Frames of that video to look at; None is all that the model takes.
            owner: See `watch`.
            leaving: See `watch`.

        Raises:
            UsageError: No picture, more than the model takes, or one path that is in no list;
                `num_frames` of pictures that are no video, or an `fps` that is none.
            DataError, NotFoundError, StorageError: See `video.each_picture`.
            Left: Nobody waits for it any more.
        """
        stopwatch, stay = Stopwatch(), leaving or Leaving()
        if isinstance(paths, str | PathLike):  # whose letters would be paths
            raise UsageError(f"look takes a list of paths, got {str(paths)!r}: put it in a list")
        if not paths:
            raise UsageError("there is no picture to look at")
        if fps is None and num_frames is not None:
            raise UsageError("frames: of no meaning for pictures without fps, leave it out")
        # One picture is what `watch` makes of it, which takes no other numbers for a picture.
        sample = Sample(self._default_frames)
        if fps is None:
            self._check_at_most("the number of pictures", len(paths))
        else:
            fps = Sample(fps=float(fps)).fps
            count = None if num_frames is None else index(num_frames)
            self._check_at_most("frames", count or 0)
            sample = Sample(count, most=self.max_frames)
        files = [Path(path) for path in paths]

        def see(told: Progress) -> tuple[Kind, Seen[Record]]:
            still = partial(self.decoding.still, leaving=stay)
            if fps is not None:
                frames = PictureFrames(files, sample, fps, self.model.image_size, still)
                return "video", self._watch(frames, stopwatch, told)
            kind: Kind = "image" if len(files) == 1 else "images"
            pictures = each_picture(files, still)
            return kind, self._look_at(pictures, len(files), stopwatch, told)

        of_frames = () if fps is None else (fps,)
        source = Source(files, (*astuple(sample), *of_frames), self._seer, owner)
        video = self._remember(source, see, stopwatch, progress, stay)
        if fps is None and video.memory.kind == "video":
            raise DataError(f"image {files[0]}: not an image, give a video alone")
        return video

    def recall(self, key: str) -> Video | None:
        """What was seen before under this `Video.key`, if it is still in the store."""
        watched = None if self.store is None else self.store.get(key)
        if watched is None or watched.seer != self._seer:
            return None
        return Video(self, watched, Cost(0, 0, Stopwatch()), key)

    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer to a question about nothing to be seen; see `ask`."""
        return self.converse().answer(question, options)

    def converse(
        self, turns: Turns = "re-pool", preface: str = "", owner: str = ""
    ) -> Conversation:
        """Questions one after the other about nothing to be seen; see `Video.converse`."""
        nothing = Watched(Memory.of_nothing(self.model), ClipInfo.of_stills(0))
        return Video(self, nothing, Cost(0, 0, Stopwatch())).converse(turns, preface, owner)

    @LoadedOnce
    def vision(self) -> Engine:
        """pixel_values → what the layout keeps."""
        return self._engine(self.layout.vision)

    @LoadedOnce
    def text(self) -> Engine:
        """input_ids → text_embed."""
        return self._engine("text")

    @LoadedOnce
    def pool(self) -> Engine:
        """What the layout keeps, text_embed, kernel, stride → pooled, relevance."""
        return self._engine(self.layout.pool)

    @LoadedOnce
    def weigh(self) -> Engine | None:
        """tokens, norms, text_embed → relevance, weights; None where `pool` does it all."""
        return self._engine(self.layout.weigh) if self.layout.weigh else None

    @LoadedOnce
    def newline(self) -> NDArray[Any] | None:
        """(D,), the embedding that ends a row of a picture; None where the model has none."""
        name, graphs = self.bundle.manifest.image_newline, self.bundle.manifest.graphs
        if name is None:
            return None
        dtype = next(spec.dtype for spec in graphs["pool"].outputs if spec.name == "pooled")
        return load_array(self.bundle.file(name), dtype, (self.model.decoder_width,))

    @LoadedOnce
    def decoder(self) -> Decoder:
        """Parts of a prompt → ids."""
        if self.device == "tensorrt":
            from ppllava_runtime.decoders.tensorrt import TensorRTDecoder

            return TensorRTDecoder(self.bundle, self.lane)
        from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder

        return OnnxRuntimeDecoder.open(self.bundle, self.threads, self.lane)

    @LoadedOnce
    def prompts(self) -> PromptBuilder:
        """Question → ids, ids → text."""
        return PromptBuilder.open(self.bundle)

    @LoadedOnce
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

    @property
    def max_frames(self) -> int:
        """The most frames of a video, or pictures: of the model and of the plans there are."""
        most = self.model.max_frames
        return min(most, self.pool.limits["T"]) if self.device == "tensorrt" else most

    def recorder(self, num_rows: int, coupled: bool) -> Recorder:
        """What stores so many rows of what the tower makes of frames, which may see each other."""
        manifest = self.bundle.manifest
        return Recorder(self.vision, self.layout, manifest, num_rows, coupled, self.lane)

    @property
    def _default_frames(self) -> int:
        return min(self.model.default_frames, self.max_frames)

    def _engine(self, name: str) -> Engine:
        engine = self.bundle.engine(name, device=self.device, threads=self.threads)
        return LanedEngine(engine, self.lane)

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

    def _watch(self, frames: ClipFrames, stopwatch: Stopwatch, progress: Progress) -> Seen[Record]:
        return watch_clip(
            frames,
            recorder_of=self.recorder,
            model=self.model,
            stopwatch=stopwatch,
            progress=progress,
        )

    def _look_at(
        self,
        pictures: Iterable[tuple[NDArray[np.uint8], str | None]],
        count: int,
        stopwatch: Stopwatch,
        progress: Progress,
    ) -> Seen[Record]:
        return watch_pictures(
            pictures,
            count,
            recorder_of=self.recorder,
            model=self.model,
            stopwatch=stopwatch,
            tiled=self.newline is not None,
            progress=progress,
        )

    def _remember(
        self,
        source: Source,
        see: Callable[[Progress], tuple[Kind, Seen[Record]]],
        stopwatch: Stopwatch,
        progress: Progress | None,
        leaving: Leaving,
    ) -> Video:
        """What is in the store, or else what there is to see, which goes there."""
        store, key, tell = self.store, None, leaving.checking(progress)
        if store is not None:
            with stopwatch.time("decode"):
                key = source.key()
        with ExitStack() as turn:
            if store is not None and key is not None:
                with stopwatch.time("decode"):  # where another does it now, all that is left of it
                    tell = turn.enter_context(store.watching(key, tell, leaving))
                if (watched := store.get(key)) is not None:
                    return Video(self, watched.of(source.paths), Cost(0, 0, stopwatch), key)
            kind, seen = see(tell)
            info, small = seen.info, seen.thumbnails
            memory = Memory(kind, seen.arrays, self.model.grid, info.timestamps, small, seen.tiling)
            watched = Watched(memory, info, source.paths, self._seer)
            key = key if source.is_unchanged() else None
            if store is not None and key is not None:
                store.put(key, watched)
        return Video(self, watched, Cost(info.num_decoded, seen.num_encoded, stopwatch), key)


def _refuse_for_picture(path: Path, given: Sequence[str]) -> None:
    if given:
        raise UsageError(
            f"image {path}: {', '.join(given)}: of no meaning for a picture, leave it out"
        )
