"""The whole story: a bundle is opened, a video is watched, a question is answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import Engine
from ppllava_engines.errors import UsageError
from ppllava_runtime.answer import Answer, Counts, Stopwatch
from ppllava_runtime.decoders import Decoder, Sampling
from ppllava_runtime.memory import Memory, encode, thumbnails
from ppllava_runtime.preprocess import pixel_values
from ppllava_runtime.prompt import PromptBuilder
from ppllava_runtime.video import ClipInfo, read_clip
from ppllava_runtime.window import Axes, Window, choose_window

DEFAULT_MAX_NEW_TOKENS = 256


class Assistant:
    """A model, ready to watch videos. Its graphs are loaded when they are first needed.

    Args:
        bundle: The exported model.
        threads: Threads of this process's one pool; None is one per core.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.threads = threads

    @staticmethod
    def open(path: str | Path, threads: int | None = None) -> Assistant:
        """The assistant for the bundle in the folder `path`.

        Raises:
            DataError, IncompatibleError, NotFoundError: See `Bundle.open`.
        """
        return Assistant(Bundle.open(path), threads)

    def load(self) -> Assistant:
        """This assistant, with all of its bundle opened: from then on the folder may change.

        Raises:
            DataError: Some file in the bundle is damaged.
            IncompatibleError: A bundle that was exported without tokenizers.
            UnavailableError: A package is missing.
        """
        _ = self.prompts, self.vision, self.text, self.pool, self.decoder
        return self

    def watch(
        self,
        path: str | Path,
        num_frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Video:
        """The video (or image) in a file, looked at once and remembered for all questions to come.

        Args:
            path: The file.
            num_frames: Frames to look at; None is what the model was trained with.
            start: First second to look at; None is the first frame.
            end: Last second to look at; None is the last frame.
            progress: Called with the number of frames encoded so far and of all.

        Raises:
            UsageError: More frames than the model takes, or a span outside the video.
            DataError, NotFoundError, StorageError, UnavailableError: See `video.read_clip`.
        """
        model, stopwatch = self.model, Stopwatch()
        num_frames = model.default_frames if num_frames is None else num_frames
        if num_frames > model.max_frames:
            raise UsageError(
                f"frames is {num_frames}, but {model.name} takes at most {model.max_frames}"
            )
        with stopwatch.time("decode"):
            clip = read_clip(path, num_frames, start, end)
        with stopwatch.time("preprocess"):
            values = pixel_values(clip.frames, model.image_size, model.image_mean, model.image_std)
        vision = self.vision
        with stopwatch.time("vision"):
            keys, hidden = encode(vision, values, model.frames_coupled, progress)
        memory = Memory(keys, hidden, model.grid, clip.info.timestamps, thumbnails(clip.frames))
        return Video(self, memory, clip.info, stopwatch)

    @cached_property
    def vision(self) -> Engine:
        """pixel_values → keys, hidden."""
        return self.bundle.engine("vision", threads=self.threads)

    @cached_property
    def text(self) -> Engine:
        """input_ids → text_embed."""
        return self.bundle.engine("text", threads=self.threads)

    @cached_property
    def pool(self) -> Engine:
        """keys, hidden, text_embed, kernel, stride → pooled, relevance."""
        return self.bundle.engine("pool", threads=self.threads)

    @cached_property
    def decoder(self) -> Decoder:
        """prompt_embeds → ids."""
        from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder

        return OnnxRuntimeDecoder.open(self.bundle, self.threads)

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Question → ids, ids → text."""
        return PromptBuilder.open(self.bundle)


class Video:
    """A video that an assistant has watched.

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
        question: str,
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
            question: In one's own words.
            num_tokens: The most visual tokens after pooling; see `window.window_within`.
            kernel: Instead of it, the pooling window over (frames, rows, columns); without any of
                the three it is the model's own.
            stride: Its step; by default the kernel.
            max_new_tokens: The longest answer.
            temperature: 0 always takes the likeliest token; see `Sampling` for this and the rest.
            top_p: Sample among the likeliest tokens that reach this probability.
            top_k: Sample among so many tokens; 0 is all.
            seed: Makes sampling repeatable.

        Raises:
            UsageError: A question that is empty, no text or holds a reserved token, a window that
                does not fit, a prompt longer than the decoder takes, or a sampling value out of
                range.
        """
        assistant, model, memory = self._assistant, self._assistant.model, self.memory
        sampling = Sampling(temperature, top_p, top_k, seed)
        default = (
            Window(model.image_kernel, model.image_stride)
            if self.info.is_still
            else Window(model.kernel, model.stride)
        )
        window = choose_window(memory.size, default, kernel, stride, num_tokens)
        prompt = assistant.prompts.build(question)
        text, pool, decoder = assistant.text, assistant.pool, assistant.decoder

        stopwatch = Stopwatch()
        with stopwatch.time("text"):
            text_embed = text.run({"input_ids": prompt.text_ids})["text_embed"]
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
        with stopwatch.time("prefill"):
            before, after = decoder.embed(prompt.before), decoder.embed(prompt.after)
            pooled = found["pooled"].astype(before.dtype, copy=False)
            prompt_embeds = np.concatenate([before, pooled, after])
        ids = decoder.generate(prompt_embeds, max_new_tokens, sampling)

        # Watching is paid for by the first answer.
        watched, self._unpaid = self._unpaid, None
        if watched:
            stopwatch.spent |= watched.spent
        counts = Counts(
            num_frames_decoded=self.info.num_decoded if watched else 0,
            num_frames_encoded=memory.size[0] if watched else 0,
            num_tokens_after=len(pooled),
            num_prompt_tokens=len(prompt_embeds),
        )
        room = min(max_new_tokens, decoder.max_positions - len(prompt_embeds) + 1)
        return Answer(
            question,
            found["relevance"],
            memory,
            ids,
            assistant.prompts.stream(),
            room,
            counts,
            stopwatch,
        )
