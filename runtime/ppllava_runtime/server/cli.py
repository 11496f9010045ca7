"""ppllava-serve: a bundle as a server that speaks OpenAI's chat completions.

The first line on stdout is the address, once questions are answered; the second is what memory it
may take. What goes wrong goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
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
from ppllava_runtime.limits import MediaLimits
from ppllava_runtime.server.addresses import is_loopback
from ppllava_runtime.server.settings import Settings

KEYS_VARIABLE = "PPLLAVA_API_KEYS"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SHORTEST_KEY = 16


def run() -> int:
    """The exit code of ppllava-serve, run with the arguments of this process."""
    return run_command(main)


def main(argv: Sequence[str]) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until what was accepted is answered.

    Args:
        argv: The arguments without the program's name.

    Raises:
        PPLLaVAError: Any failure to start.
    """
    options, settings = read(argv)
    try:
        from ppllava_runtime.server.running import serve
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"server: {error.name} is not installed: pip install 'ppllava-edge[serve]'"
        ) from error
    serve(
        options.bundle,
        settings,
        host=options.host,
        port=options.port,
        device=options.device,
        threads=options.threads,
        memory=options.memory,
    )


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """What the arguments say, all of it, and the settings among it.

    Args:
        argv: The arguments without the program's name.

    Raises:
        UsageError: They would let everybody in, or keys are none.
        NotFoundError, StorageError: A file or folder among them cannot be read.
    """
    options = _parser().parse_args(argv)
    settings = _settings(options)
    _check_host(options.host, settings)
    return options, settings


def _settings(options: argparse.Namespace) -> Settings:
    given = vars(options)
    media = {name: given[name] for name in _names(MediaLimits) if given.get(name) is not None}
    rest = {name: given[name] for name in _names(Settings) if given.get(name) is not None}
    for path in options.media_roots:
        if not path.is_dir():
            raise NotFoundError(f"--media-root {path}: there is no such folder")
    rest |= {name: tuple(rest[name]) for name in ("media_domains", "private_hosts", "media_roots")}
    rest["api_keys"] = _keys(options.api_keys)
    return Settings(**rest, media=MediaLimits(**media))


def _names(kind: type[Settings] | type[MediaLimits]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line, or else of the environment; never of the command line."""
    where, text = f"${KEYS_VARIABLE}", os.environ.get(KEYS_VARIABLE, "")
    if path is not None:
        where = f"--api-keys {path}"
        try:
            text = strict_json.read_text(path)
        except FileNotFoundError as error:
            raise NotFoundError(f"{where}: no such file") from error
        except OSError as error:
            raise StorageError(f"{where}: it cannot be read: {error.strerror}") from error
    keys = tuple(dict.fromkeys(text.split()))
    if path is not None and not keys:  # else an empty file would let everybody in
        raise UsageError(f"{where}: there is no key in it, expected one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST_KEY or not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"{where}: key {number} is not {_SHORTEST_KEY} or more characters of ASCII: make "
                "one with `openssl rand -hex 32`"
            )
    return keys


def _check_host(host: str, settings: Settings) -> None:
    """Refuses to be asked by everybody on a network."""
    if not is_loopback(host) and not settings.api_keys:
        raise UsageError(
            f"--host {host}: without API keys only this machine may ask: give --api-keys FILE "
            f"(one a line) or ${KEYS_VARIABLE}, or leave --host out"
        )


def _size(text: str) -> int:
    """Bytes: 1000, 64K, 256M or 1.5G."""
    unit = text[-1:].upper()
    number = text[:-1] if unit in ("K", "M", "G") else text
    try:
        size = int(float(number) * _UNITS[unit if number != text else ""])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: 1000, 64K, 256M or 1.5G")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return count


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535, 0 for any free one")
    return port


def _parser() -> argparse.ArgumentParser:
    defaults, limits = Settings(), MediaLimits()
    parser = argparse.ArgumentParser(
        prog="ppllava-serve",
        description="Serves a bundle: OpenAI's chat completions with videos and pictures, live "
        "video, and a page.",
        epilog="A SIZE is in bytes, or in binary units as 64K, 256M, 1.5G; S is in seconds.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder made by ppllava-export")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0 is any free one (default: %(default)s)")
    add("--device", choices=DEVICES, default="cpu", help="(default: %(default)s)")
    add("--threads", type=_count, metavar="N", help="default: one per core")
    add("--memory", choices=MEMORY_KINDS, default="hidden", help="what to keep of a video "
        "(default: %(default)s)")  # fmt: skip
    add("--api-keys", type=Path, metavar="FILE", help="keys, one a line, each a tenant of its own; "
        f"or ${KEYS_VARIABLE}; without any, only this machine may ask")  # fmt: skip

    def several(flag: str, name: str, metavar: str, about: str, kind: type = str) -> None:
        add(flag, dest=name, type=kind, action="append", default=[], metavar=metavar,
            help=f"{about}; may be given again (default: none)")  # fmt: skip

    several("--media-domain", "media_domains", "NAME", "public host to fetch media from: "
            "example.com, or *.example.com for what is below it")  # fmt: skip
    several("--private-host", "private_hosts", "HOST[:PORT]", "host with a private address "
            "to fetch media from")  # fmt: skip
    several("--media-root", "media_roots", "DIR", "folder of file:// URLs", Path)

    def setting(
        flag: str, name: str, kind: Callable[[str], object], metavar: str, about: str
    ) -> None:
        default = getattr(limits if name in _names(MediaLimits) else defaults, name)
        shown = (
            _shown(default) if kind is _size else f"{default:g}" if kind is _seconds else default
        )
        add(flag, dest=name, type=kind, metavar=metavar, help=f"{about} (default: {shown})")

    setting("--running", "num_running", _count, "N", "requests answered at once")
    setting("--queued", "num_queued", _count_or_none, "N", "requests that wait for that; more: 429")
    setting("--live", "num_live", _count_or_none, "N", "live sessions at once")
    setting("--live-window", "live_seconds", _seconds, "S", "window of a live session")
    setting("--live-rate", "live_fps", _seconds, "FPS", "frames a second that it keeps")
    setting("--cache-size", "cache_bytes", _size, "SIZE", "memories of videos, for next questions")
    setting("--body-size", "body_bytes", _size, "SIZE", "most of a request")
    setting("--head-timeout", "head_seconds", _seconds, "S", "for a request's headers")
    setting("--body-timeout", "body_seconds", _seconds, "S", "for its body")
    setting("--request-timeout", "request_seconds", _seconds, "S", "for all of it and its answer")
    setting("--drain-timeout", "drain_seconds", _seconds, "S", "after SIGTERM, to answer what was "
            "accepted")  # fmt: skip
    setting("--connections", "num_connections", _count, "N", "open at once")
    setting("--spool", "spool", Path, "DIR", "folder for media of requests being answered")
    setting("--media-size", "num_bytes", _size, "SIZE", "most of a file of media")
    setting("--media-pixels", "num_pixels", _count, "N", "width × height of a frame or picture")
    setting("--media-frames", "num_frames", _count, "N", "frames of a file")
    setting("--media-seconds", "seconds", _seconds, "S", "duration of a file")
    setting("--media-wall-time", "wall_seconds", _seconds, "S", "to decode a file")
    setting("--media-cpu-time", "cpu_seconds", _seconds, "S", "processor time to decode a file")
    setting("--media-memory", "address_space", _size, "SIZE", "of the process that decodes a file")
    return parser


def _shown(size: int) -> str:
    for unit in ("G", "M", "K"):
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


if __name__ == "__main__":
    sys.exit(run())
