"""ppllava-chat: questions about a video, about pictures or about nothing, on the command line.

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
from functools import partial
from pathlib import Path

from ppllava_engines import strict_json
from ppllava_engines.engine import DEVICES
from ppllava_engines.errors import (
    NotFoundError,
    StorageError,
    UnavailableError,
    UsageError,
    run_command,
)
from ppllava_engines.memory_layout import MEMORY_KINDS
from ppllava_runtime.answer import Answer
from ppllava_runtime.asking import DEFAULT_MAX_NEW_TOKENS, Options
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.conversation import TURNS, Video
from ppllava_runtime.video import ClipInfo
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
    options = _parsed(argv)
    _check_together(options)
    files = [] if options.video is None else [options.video, *options.image]
    sees = bool(files) or options.video_input is not None
    if options.heatmap:
        _check_heatmap(options.heatmap, files or _source(options), sees)
    schema = options.json_schema and _read(options.json_schema)
    # All of the bundle now: it may be replaced while a person types.
    assistant = Assistant.open(
        options.bundle, options.threads, options.device, options.memory or "hidden"
    ).load()
    # Made before the video is watched, so that what is wrong with them is said at once.
    asked = Options(
        num_tokens=options.tokens,
        kernel=options.kernel,
        stride=options.stride,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop=options.stop,
        json_schema=schema,
        regex=options.regex,
    )
    assistant.constraint(asked.json_schema, asked.regex)
    if options.video_input is not None:
        _watch_live(assistant, asked, options)
        return
    seen = _watch(assistant, files, options) if files else assistant
    info = seen.info if isinstance(seen, Video) else ClipInfo.of_stills(0)
    if info.damage:
        print(f"warning: {info.damage}", file=sys.stderr)
    asker = seen.converse(options.turns) if options.turns else seen
    ask = partial(asker.answer, options=asked)
    show = partial(_show_json if options.json else _show_text, info=info, heatmap=options.heatmap)
    if options.question is not None:
        show(ask(options.question))
        return
    _converse(ask, show, files, sees, options.json)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; where a source is given, the question comes in the place of VIDEO."""
    parser = _parser()
    # Intermixed, so that the question may follow options.
    options = parser.parse_intermixed_args(argv)
    if options.video_input is not None:
        if options.question is not None:
            parser.error("--video-input is looked at instead of VIDEO: leave that out")
        options.video, options.question = None, options.video
    elif options.video is None:
        parser.error("the following arguments are required: VIDEO (or --video-input)")
    else:
        options.video = None if options.video == "-" else Path(options.video)
    return options


def _check_together(options: argparse.Namespace) -> None:
    """Refuses options that say something about what will not be looked at."""
    if options.video_input is not None:
        _refuse(options, "frames", "fps", "start", "end", "turns", why="for what goes on")
        if options.image:
            raise UsageError("--image: of no meaning for what goes on, leave it out")
        return
    _refuse(options, "window", "rate", why="without --video-input")
    if options.video is None and options.image:
        raise UsageError("--image adds to a first picture: give that one instead of -")
    idle: list[str] = []
    if options.video is None or options.image:
        idle += ["frames", "fps", "start", "end"]
    if options.video is None:
        idle += ["tokens", "kernel", "stride", "heatmap", "memory"]
    _refuse(options, *idle, why="without a video" if options.video is None else "for pictures")


def _refuse(options: argparse.Namespace, *names: str, why: str) -> None:
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: of no meaning {why}, leave it out")


def _watch(assistant: Assistant, files: Sequence[Path], options: argparse.Namespace) -> Video:
    if len(files) > 1:
        return assistant.look(files, _progress())
    span = (options.start, options.end)
    return assistant.watch(files[0], options.frames, *span, _progress(), fps=options.fps)


def _watch_live(assistant: Assistant, asked: Options, options: argparse.Namespace) -> None:
    """Answers about what a source shows, as the window is when each question comes."""
    from ppllava_runtime.chat_live import LiveChat

    with LiveChat(assistant, options.video_input, options.window, options.rate) as watched:

        def show(answer: Answer) -> None:
            info, heatmap = watched.info(answer), options.heatmap
            if options.json:
                _show_json(answer, info, heatmap, live=watched.counts())
                return
            _show_text(answer, info, heatmap)
            _tell(" · ".join(f"{count} {fate}" for fate, count in watched.counts().items()))

        ask = partial(watched.answer, options=asked)
        if options.question is not None:
            watched.fill(_progress())
            show(ask(options.question))
            return
        _converse(ask, show, _source(options), True, options.json, watched.check)


def _source(options: argparse.Namespace) -> list[Path]:
    """The file that is played as if it were live; what is none is found nowhere."""
    return [] if options.video_input is None else [Path(options.video_input)]


def _converse(
    ask: Callable[[str], Answer],
    show: Callable[[Answer], None],
    files: Sequence[Path],
    sees: bool,
    in_json: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Answers line by line, until there are no more or `check` raises what ends it all."""
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
                _check_heatmap(Path(rest.strip()), files, sees)
                last.save_heatmap(rest.strip())
                _tell(f"wrote {rest.strip()}")
            else:
                raise UsageError(f"{command} is not understood: type {_HELP}")
        except (UsageError, StorageError, UnavailableError) as error:  # the next may be better
            check()
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # enough of this answer
            print(file=sys.stderr if in_json else sys.stdout)


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


def _show_text(answer: Answer, info: ClipInfo, heatmap: Path | None) -> None:
    for piece in answer:
        print(piece, end="", flush=True)
    print(flush=True)
    cost = answer.accounting
    spent = cost.milliseconds
    seen = ""
    if answer.kind is not None:
        what = "frames" if answer.kind == "video" else "pictures"
        watched = f", {cost.num_frames_encoded} encoded" if cost.num_frames_encoded else ""
        seen = (
            f"{cost.num_frames_sampled} of {info.num_frames} {what}{watched} · "
            f"{cost.num_tokens_before} → {cost.num_tokens_after} visual tokens · "
        )
    cut = " (cut)" if answer.was_cut else ""
    _tell(
        f"{seen}first token {spent.first_token:.0f} ms · {cost.num_new_tokens} tokens{cut} in "
        f"{spent.total:.0f} ms"
    )
    if heatmap:
        answer.save_heatmap(heatmap)
        _tell(f"wrote {heatmap}")


def _show_json(
    answer: Answer, info: ClipInfo, heatmap: Path | None, live: dict[str, int] | None = None
) -> None:
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
        "finish_reason": answer.finish_reason,
        "media": answer.kind,
        "timestamps": [round(float(second), 6) for second in info.timestamps],
        "damage": info.damage,
        "heatmap": str(heatmap) if heatmap else None,
        "accounting": dataclasses.asdict(cost) | {"milliseconds": milliseconds},
    }
    if live is not None:
        record["live"] = live
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


def _check_heatmap(path: Path, files: Sequence[Path], sees: bool) -> None:
    """Says before the work, and not after it, that its result could not or must not be written."""
    from ppllava_runtime.heatmap import SUFFIXES

    if not sees:
        raise UsageError(f"heatmap {path}: there is no video to draw it on")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"heatmap {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"heatmap {path}: there is no folder {path.absolute().parent}")
    for file in files:
        with suppress(OSError):  # what cannot be found is not the same
            if path.samefile(file):
                raise UsageError(
                    f"heatmap {path}: this is what is looked at itself, give another name"
                )


def _read(path: Path) -> str:
    try:
        return strict_json.read_text(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"schema {path}: no such file") from error
    except OSError as error:
        raise StorageError(f"schema {path}: it cannot be read: {error}") from error


def _axes(text: str) -> Axes:
    try:
        t, h, w = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers: t,h,w") from None
    return (t, h, w)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-chat",
        description="Answers questions about a video, about pictures, or about nothing but words.",
        epilog=f"Without a question, each line of input is one: {_HELP}.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder made by ppllava-export")
    add("video", nargs="?", metavar="VIDEO", help="video or picture; - for none")
    add("question", nargs="?", help="in your own words")
    add("--image", type=Path, action="append", default=[], metavar="PATH",
        help="another picture beside the first; may be given again")  # fmt: skip
    add("--video-input", metavar="SOURCE", help="instead of VIDEO, what goes on: /dev/videoN, "
        "csi://N, a live stream's URL of rtsp, rtsps, http, https or udp, or a file")  # fmt: skip
    add(
        "--window",
        type=float,
        metavar="S",
        help="seconds of it to look at (default: 10, or what the model takes)",
    )
    add("--rate", type=float, metavar="FPS", help="frames a second of it to keep (default: 2)")
    add("--heatmap", type=Path, metavar="PATH", help="where the model looked: a .png or .mp4")
    add(
        "--frames",
        type=int,
        metavar="N",
        help="frames of a video to look at (default: the model's)",
    )
    add("--fps", type=float, metavar="X", help="or so many a second of it, --frames at most")
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
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end the answer before this; may be given again")  # fmt: skip
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json-schema", type=Path, metavar="PATH",
        help="answer in JSON of the schema in a file")  # fmt: skip
    shape.add_argument("--regex", metavar="TEXT", help="answer in the words of an expression")
    add("--turns", choices=TURNS, help="ask each question behind those before it: each guides the "
        "pooling, or the first one's visual tokens stay (default: each on its own)")  # fmt: skip
    add("--memory", choices=MEMORY_KINDS, help="what to keep of a video; ppllava-plan says what "
        "each costs (default: hidden)")  # fmt: skip
    add("--device", choices=DEVICES, default="cpu", help="openvino is a CPU too, tensorrt a GPU "
        "that needs ppllava-build (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: one per core")
    add("--json", action="store_true", help="one JSON object per answer")
    return parser


if __name__ == "__main__":
    sys.exit(run())
