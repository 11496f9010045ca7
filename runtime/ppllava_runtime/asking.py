"""How a question is asked: the one place that says what may be given with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppllava_runtime.answer import Answer
from ppllava_runtime.decoders import Sampling
from ppllava_runtime.prompt import Prompt
from ppllava_runtime.stopping import StopStrings
from ppllava_runtime.window import Axes

DEFAULT_MAX_NEW_TOKENS = 256

Schema = str | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a question is asked; see `Asker.ask` for what each means.

    Raises:
        UsageError: A sampling value out of range, or stop strings that are none.
    """

    num_tokens: int | None = None
    kernel: Axes | None = None
    stride: Axes | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    json_schema: Schema | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        _ = self.sampling, StopStrings(self.stop)

    @property
    def sampling(self) -> Sampling:
        """How each id is picked."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    @property
    def has_window(self) -> bool:
        """Whether it says anything about pooling."""
        return any(given is not None for given in (self.num_tokens, self.kernel, self.stride))


class Asker(ABC):
    """What questions can be put to."""

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
        stop: Sequence[str] = (),
        json_schema: Schema | None = None,
        regex: str | None = None,
    ) -> Answer:
        """The answer, of which `relevance` is there at once and the text comes by iterating.

        Args:
            question: In one's own words, in which a token reserved for the template is no command:
                "<image>" is read as "< image>". Or its ids, which is what a bundle without
                tokenizers takes.
            num_tokens: The most visual tokens in the prompt; see `window.window_within`.
            kernel: Instead of it, the pooling window over (frames, rows, columns); without any of
                the three it is the model's own.
            stride: Its step; by default the kernel.
            max_new_tokens: The longest answer.
            temperature: 0 always takes the likeliest token; see `Sampling` for this and the rest.
            top_p: Sample among the likeliest tokens that reach this probability.
            top_k: Sample among so many tokens; 0 is all.
            seed: Makes sampling repeatable.
            stop: Texts before any of which the answer ends.
            json_schema: What the answer is, in JSON.
            regex: Or the regular expression that it matches.

        Raises:
            UsageError: A question that is empty, no text or becomes a reserved token, ids without a
                place for what was seen, a window that does not fit or where nothing was seen, a
                prompt longer than the decoder takes, a sampling value out of range, stop strings
                that are none, or a schema or an expression that is none.
            IncompatibleError: A question in words, and a bundle without tokenizers.
            UnavailableError: A schema or an expression, and the package for it is missing.
        """
        options = Options(
            num_tokens=num_tokens,
            kernel=kernel,
            stride=stride,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            json_schema=json_schema,
            regex=regex,
        )
        return self.answer(question, options)

    @abstractmethod
    def answer(self, question: str | Prompt, options: Options) -> Answer:
        """The answer to a question with all that is given with it; see `ask`."""
