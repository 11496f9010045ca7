"""The whole story: a bundle is opened, a video is watched, a question is answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import DEVICES, Engine
from ppllava_engines.errors import InternalError, UsageError
from ppllava_runtime.answer import Answer, Counts, Stopwatch
from ppllava_runtime.anyres import Tiling
from ppllava_runtime.arrays import load_array
from ppllava_runtime.decoders import Decoder, Sampling
from ppllava_runtime.memory import Kind, Memory, encode, thumbnails
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.prompt import Prompt, PromptBuilder
from ppllava_runtime.video import ClipInfo, read_clip, read_pictures
from ppllava_runtime.window import Axes, Window

DEFAULT_MAX_NEW_TOKENS = 256

Progress = Callable[[int, int], None]


class Assistant:
    """A model, ready to watch videos. Its graphs are loaded when they are first needed.

    Args:
        bundle: The exported model.
        threads: Threads that work on one operator; None is one per core.
        device: "cpu", or "tensorrt" for a GPU, where ppllava-build made plans of the bundle.

    Raises:
        UsageError: Another device.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, device: str = "cpu") -> None:
        if device not in DEVICES:
            raise UsageError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.threads = threads
        self.device = device

    @staticmethod
    def open(path: str | Path, threads: int | None = None, device: str = "cpu") -> Assistant:
        """The assistant for the bundle in the folder `path`.

        Raises:
            DataError, IncompatibleError, NotFoundError: See `Bundle.open`.
            UsageError: A device that is not known.
        """
        return Assistant(Bundle.open(path), threads, device)

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
        _ = self.prompts, self.vision, self.text, self.pool, self.newline, self.decoder
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
                for a picture.
            DataError, NotFoundError, StorageError, UnavailableError: See `video.read_clip`.
        """
        stopwatch = Stopwatch()
        asked = {"frames": num_frames, "start": start, "end": end}
        if num_frames is None:
            num_frames = min(self.model.default_frames, self.max_frames)
        self._check_at_most("frames", num_frames)
        with stopwatch.time("decode"):
            clip = read_clip(path, num_frames, start, end)
        given = [name for name, value in asked.items() if value is not None]
        if clip.info.is_still and given:
            raise UsageError(
                f"image {path}: {', '.join(given)}: of no meaning for a picture, leave it out"
            )
        kind: Kind = "image" if clip.info.is_still else "video"
        return self._remember(kind, clip.frames, clip.info, stopwatch, progress)

    def look(self, paths: Sequence[str | Path], progress: Progress | None = None) -> Video:
        """Several pictures, looked at together and remembered; one is seen as `watch` sees it.

        Args:
            paths: Their files.
            progress: Called with the number of pictures encoded so far and of all.

        Raises:
            UsageError: No picture, more than the model takes, or one path that is in no list.
            DataError, NotFoundError, StorageError: See `video.read_pictures`.
        """
        stopwatch = Stopwatch()
        if isinstance(paths, str | PathLike):  # whose letters would be paths
            raise UsageError(f"look takes a list of paths, got {str(paths)!r}: put it in a list")
        if not paths:
            raise UsageError("there is no picture to look at")
        self._check_at_most("the number of pictures", len(paths))
        with stopwatch.time("decode"):
            pictures, info = read_pictures([Path(path) for path in paths])
        kind: Kind = "image" if len(pictures) == 1 else "images"
        return self._remember(kind, pictures, info, stopwatch, progress)

    def ask(
        self,
        question: str | Prompt,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> Answer:
        """The answer to a question about nothing to be seen; see `Video.ask`."""
        nothing = Memory.of_nothing(self.model)
        return Video(self, nothing, ClipInfo.of_stills(0), Stopwatch()).ask(
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )

    @cached_property
    def vision(self) -> Engine:
        """pixel_values → keys, hidden."""
        return self._engine("vision")

    @cached_property
    def text(self) -> Engine:
        """input_ids → text_embed."""
        return self._engine("text")

    @cached_property
    def pool(self) -> Engine:
        """keys, hidden, text_embed, kernel, stride → pooled, relevance."""
        return self._engine("pool")

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
        """prompt_embeds → ids."""
        if self.device == "tensorrt":
            from ppllava_runtime.decoders.tensorrt import TensorRTDecoder

            return TensorRTDecoder(self.bundle)
        from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder

        return OnnxRuntimeDecoder.open(self.bundle, self.threads)

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Question → ids, ids → text."""
        return PromptBuilder.open(self.bundle)

    def _engine(self, name: str) -> Engine:
        return self.bundle.engine(name, device=self.device, threads=self.threads)

    @cached_property
    def max_frames(self) -> int:
        """The most frames of a video, or pictures: of the model and of the plans there are."""
        most = self.model.max_frames
        return most if self.device == "cpu" else min(most, self.pool.limits["T"])

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

    def _remember(
        self,
        kind: Kind,
        pictures: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
        info: ClipInfo,
        stopwatch: Stopwatch,
        progress: Progress | None,
    ) -> Video:
        """What was seen in the pictures (H,W,3) uint8 RGB."""
        model, views, tiling = self.model, pictures, None
        with stopwatch.time("preprocess"):
            if kind == "image" and self.newline is not None:
                height, width, _ = pictures[0].shape
                tiling = Tiling.of((height, width), model.image_grid_pinpoints, model.image_size)
                views = tiling.views(pictures[0])
            values = pixel_values(views, model.image_size, model.image_mean, model.image_std)
        vision = self.vision
        together = None
        if model.frames_coupled:  # in time: views of one picture are not
            together = 1 if kind == "image" else len(values)
        with stopwatch.time("vision"):
            keys, hidden = encode(vision, values, together, progress)
        seen = (info.timestamps, thumbnails(pictures), tiling)
        return Video(self, Memory(kind, keys, hidden, model.grid, *seen), info, stopwatch)


class Video:
    """A video, a picture or several that an assistant has looked at.

    Attributes:
        memory: What is kept of it.
        info: About the file and the frames chosen from it.
    """

    def __init__(
        self, assistant: Assistant, memory: Memory, info: ClipInfo, stopwatch: Stopwatch
    ) -> None:
        self.memory = memory
        self.info = info
        self._assistant = assistant
        self._unpaid: Stopwatch | None = stopwatch

    def ask(
        self,
        question: str | Prompt,
        *,
        num_tokens: int | None = None,
        kernel: Axes | None = None,
        stride: Axes | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> Answer:
        """The answer, of which `relevance` is there at once and the text comes by iterating.

        Args:
            question: In one's own words; or its ids, which is what a bundle without tokenizers
                takes.
            num_tokens: The most visual tokens in the prompt; see `window.window_within`.
            kernel: Instead of it, the pooling window over (frames, rows, columns); without any of
                the three it is the model's own.
            stride: Its step; by default the kernel.
            max_new_tokens: The longest answer.
            temperature: 0 always takes the likeliest token; see `Sampling` for this and the rest.
            top_p: Sample among the likeliest tokens that reach this probability.
            top_k: Sample among so many tokens; 0 is all.
            seed: Makes sampling repeatable.

        Raises:
            UsageError: A question that is empty, no text or holds a reserved token, ids without a
                place for what was seen, a window that does not fit, a prompt longer than the
                decoder takes, or a sampling value out of range.
            IncompatibleError: A question in words, and a bundle without tokenizers.
        """
        assistant, memory = self._assistant, self.memory
        sampling = Sampling(temperature, top_p, top_k, seed)
        window = memory.window(assistant.model, kernel, stride, num_tokens)
        prompt = self._prompt(question, memory.num_places(window))
        decoder, stopwatch = assistant.decoder, Stopwatch()
        splices, relevance = self._pool(question, prompt, window, stopwatch)
        with stopwatch.time("prefill"):
            first, *others = prompt.parts(assistant.model.image_token_index)
            embeds = [decoder.embed(first)]
            for splice, part in zip(splices, others, strict=True):
                embeds += [splice.astype(embeds[0].dtype, copy=False), decoder.embed(part)]
            prompt_embeds = np.concatenate(embeds)
        ids = decoder.generate(prompt_embeds, max_new_tokens, sampling)

        # Watching is paid for by the first answer.
        watched, self._unpaid = self._unpaid, None
        if watched:
            stopwatch.spent |= watched.spent
        counts = Counts(
            num_frames_decoded=self.info.num_decoded if watched else 0,
            num_frames_encoded=memory.size[0] if watched else 0,
            num_tokens_after=sum(map(len, splices)),
            num_prompt_tokens=len(prompt_embeds),
        )
        has_text = bool(assistant.bundle.manifest.tokenizers)
        return Answer(
            question if isinstance(question, str) else "",
            relevance,
            memory,
            ids,
            assistant.prompts.stream() if has_text else None,
            min(max_new_tokens, decoder.max_positions - len(prompt_embeds) + 1),
            counts,
            stopwatch,
        )

    def _prompt(self, question: str | Prompt, num_places: int) -> Prompt:
        """The question's ids, in which there are so many places for visual tokens."""
        if isinstance(question, str):
            return self._assistant.prompts.build(question, num_places)
        question.check(self._assistant.bundle.manifest, num_places)
        return question

    def _pool(
        self, question: str | Prompt, prompt: Prompt, window: Window, stopwatch: Stopwatch
    ) -> tuple[list[NDArray[Any]], NDArray[np.float32]]:
        """What goes into each place of the prompt, (n,D); and the relevance (T,h,w)."""
        assistant, memory = self._assistant, self.memory
        if memory.kind is None:
            return [], np.empty(memory.size, np.float32)
        text, pool = assistant.text, assistant.pool
        with stopwatch.time("text"):
            try:
                text_embed = text.run({"input_ids": prompt.text_ids})["text_embed"]
            except InternalError as error:
                if isinstance(question, str):
                    raise
                # The graph alone knows how many ids there are.
                raise UsageError(
                    f"the prompt's text_ids go up to {prompt.text_ids.max()} and the text graph "
                    f"does not take them, expected its tokenizer's: {error}"
                ) from error
        with stopwatch.time("pool"):
            found = pool.run(
                {
                    "keys": memory.keys,
                    "hidden": memory.hidden,
                    "text_embed": text_embed,
                    "kernel": np.array(window.kernel, np.int64),
                    "stride": np.array(window.stride, np.int64),
                }
            )
            splices = memory.splices(found["pooled"], window, assistant.newline)
        return splices, found["relevance"]
