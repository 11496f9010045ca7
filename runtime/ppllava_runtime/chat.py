"""ppllava-chat: questions about one video, on the command line.

Answers go to stdout; progress, warnings, costs and errors go to stderr. Exit codes are those of
ppllava_engines.errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ppllava_engines.errors import StorageError, UsageError, run_command
from ppllava_runtime.answer import Answer
from ppllava_runtime.assistant import DEFAULT_MAX_NEW_TOKENS, Assistant, Video
from ppllava_runtime.window import Axes

_DIM, _PLAIN, _CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
_HELP = "a question, /heatmap PATH for the last answer, or an empty line to end"


def run() -> int:
    """The exit code of ppllava-chat, run with the arguments of this process."""
    return run_command(main)


def main(argv: Sequence[str]) -> None:
    """Answers the question in `argv`, or those typed in until there are no more.

    Args:
        argv: The arguments without the program's name.

    Raises:
        PPLLaVAError: Any failure, except of one question among several.
    """
    options = _parser().parse_args(argv)
    if options.heatmap:
        _check_heatmap(options.heatmap, options.video)
    # All of the bundle now: it may be replaced while a person types.
    assistant = Assistant.open(options.bundle, options.threads).load()
    video = assistant.watch(options.video, options.frames, options.start, options.end, _progress())
    if video.info.damage:
        print(f"warning: {video.info.damage}", file=sys.stderr)

    def ask(question: str) -> Answer:
        return video.ask(
            question,
            num_tokens=options.tokens,
            kernel=options.kernel,
            stride=options.stride,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )

    show = _show_json if options.json else _show_text
    if options.question is not None:
        show(ask(options.question), video, options.heatmap)
        return
    _converse(ask, lambda answer: show(answer, video, options.heatmap), options)


def _converse(
    ask: Callable[[str], Answer], show: Callable[[Answer], None], options: argparse.Namespace
) -> None:
    last: Answer | None = None
    for line in _lines():
        try:
            command, _, rest = line.partition(" ")
            if not line.startswith("/"):
                last = ask(line)
                show(last)
            elif command == "/heatmap" and rest.strip():
                if last is None:
                    raise UsageError("there is no answer yet to draw a heatmap of")
                _check_heatmap(Path(rest.strip()), options.video)
                last.save_heatmap(rest.strip())
                _tell(f"wrote {rest.strip()}")
            else:
                raise UsageError(f"{command} is not understood: type {_HELP}")
        except (UsageError, StorageError) as error:  # of this line, so the next one may be better
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # enough of this answer
            print(file=sys.stderr if options.json else sys.stdout)


def _lines() -> Iterator[str]:
    """What is typed or piped in, up to an empty line, /quit or the end."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its editing and history

        _tell(_HELP)
        prompt = "> " if sys.stdout.isatty() else ""  # input() would write it among the answers
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line in ("", "/quit"):
            return
        yield line


def _show_text(answer: Answer, video: Video, heatmap: Path | None) -> None:
    for piece in answer:
        print(piece, end="", flush=True)
    print(flush=True)
    cost = answer.accounting
    spent = cost.milliseconds
    seen = f"{cost.num_frames_sampled} of {video.info.num_frames} frames"
    watched = f", {cost.num_frames_encoded} encoded" if cost.num_frames_encoded else ""
    cut = " (cut)" if answer.was_cut else ""
    _tell(
        f"{seen}{watched} · {cost.num_tokens_before} → {cost.num_tokens_after} visual tokens · "
        f"first token {spent.first_token:.0f} ms · {cost.num_new_tokens} tokens{cut} in "
        f"{spent.total:.0f} ms"
    )
    if heatmap:
        answer.save_heatmap(heatmap)
        _tell(f"wrote {heatmap}")


def _show_json(answer: Answer, video: Video, heatmap: Path | None) -> None:
    text, cost = answer.text, answer.accounting
    if heatmap:
        answer.save_heatmap(heatmap)
    spent = cost.milliseconds
    milliseconds = {name: round(value, 3) for name, value in vars(spent).items()}
    milliseconds |= {"first_token": round(spent.first_token, 3), "total": round(spent.total, 3)}
    record = {
        "question": answer.question,
        "answer": text,
        "was_cut": answer.was_cut,
        "timestamps": [round(float(second), 6) for second in video.info.timestamps],
        "damage": video.info.damage,
        "heatmap": str(heatmap) if heatmap else None,
        "accounting": dataclasses.asdict(cost) | {"milliseconds": milliseconds},
    }
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _progress() -> Callable[[int, int], None] | None:
    """Shows how many frames are encoded, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        line = "" if done == total else f"{_DIM}watching, {done} of {total} frames{_PLAIN}"
        print(f"{_CLEAR_LINE}{line}", end="", file=sys.stderr, flush=True)

    return show


def _tell(note: str) -> None:
    if sys.stderr.isatty():
        print(f"{_DIM}{note}{_PLAIN}", file=sys.stderr)


def _check_heatmap(path: Path, video: Path) -> None:
    """Says before the work, and not after it, that its result could not or must not be written."""
    from ppllava_runtime.heatmap import SUFFIXES

    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"heatmap {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"heatmap {path}: there is no folder {path.absolute().parent}")
    with suppress(OSError):  # what cannot be found is not the same
        if path.samefile(video):
            raise UsageError(f"heatmap {path}: this is the video itself, give another name")


def _axes(text: str) -> Axes:
    try:
        t, h, w = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers: t,h,w") from None
    return (t, h, w)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-chat",
        description="Answers questions about a video (or an image).",
        epilog=f"Without a question, each line of input is one: {_HELP}.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder made by ppllava-export")
    add("video", type=Path, metavar="VIDEO", help="video or image file")
    add("question", nargs="?", help="in your own words")
    add("--heatmap", type=Path, metavar="PATH", help="where the model looked: a .png or .mp4")
    add("--frames", type=int, metavar="N", help="frames to look at (default: the model's)")
    add("--start", type=float, metavar="S", help="first second to look at")
    add("--end", type=float, metavar="S", help="last second to look at")
    add("--tokens", type=int, metavar="N", help="at most so many visual tokens after pooling")
    add("--kernel", type=_axes, metavar="t,h,w", help="or the pooling window")
    add("--stride", type=_axes, metavar="t,h,w", help="and its step (default: the kernel)")
    add("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N",
        help="longest answer (default: %(default)s)")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="X",
        help="0 takes the likeliest token (default), 1 samples as the model says")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest share")
    add("--top-k", type=int, default=0, metavar="K", help="sample among so many tokens")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--threads", type=int, metavar="N", help="default: one per core")
    add("--json", action="store_true", help="one JSON object per answer")
    return parser


if __name__ == "__main__":
    sys.exit(run())
