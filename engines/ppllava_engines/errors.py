"""Every way to fail, each with the exit code that a command line ends with.

PPLLaVAError                70
├── UsageError               2   a wrong option, argument or call
├── DataError               65   bad data: a video, a checkpoint, a bundle, an array
│   └── MediaError          65   a stranger's video or picture: damaged, or it breaks a limit
├── NotFoundError           66   a file or folder that is not there
├── UnavailableError        69   a missing package or device; names the pip command
│   └── SandboxError        69   what decodes strangers' files is gone, or cannot be started
├── InternalError           70   a promise that this code itself broke
├── StorageError            74   reading or writing failed
└── IncompatibleError       78   well formed, but of a version or variant not known here

A message is one sentence: the stage, the name, what was got, what was expected, what to do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

DEBUG_VARIABLE = "PPLLAVA_DEBUG"
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13
EXIT_TERMINATED = 128 + 15


class PPLLaVAError(Exception):
    """Any failure that is told to a person in one sentence."""

    exit_code: ClassVar[int] = 70


class UsageError(PPLLaVAError):
    """A wrong option, argument or call."""

    exit_code = 2


class DataError(PPLLaVAError):
    """Bad data: a video, a checkpoint, a bundle or an array that is not what it must be."""

    exit_code = 65


class MediaError(DataError):
    """A video or a picture from a stranger that is damaged, breaks a limit or broke its decoder."""


class NotFoundError(PPLLaVAError):
    """A file or folder that is not there."""

    exit_code = 66


class UnavailableError(PPLLaVAError):
    """A package or device that is missing; the message names the pip command."""

    exit_code = 69


class SandboxError(UnavailableError):
    """What decodes the files of strangers is gone or cannot be started; no file is to blame."""


class InternalError(PPLLaVAError):
    """A promise that this code itself broke."""

    exit_code = 70


class StorageError(PPLLaVAError):
    """Reading or writing failed."""

    exit_code = 74


class IncompatibleError(PPLLaVAError):
    """Well formed, but of a version or variant that this release does not know."""

    exit_code = 78


def run_command(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None
) -> int:
    """The exit code of a command line, after any failure was told in one sentence on stderr.

    A traceback is printed only when the environment variable PPLLAVA_DEBUG is "1". SIGTERM ends the
    command as Ctrl-C does, so that it removes what is unfinished. Raises nothing.

    Args:
        main: The command: takes its arguments, returns its exit code (None means 0).
        argv: The arguments without the program's name; None takes them from the process.
    """
    try:
        with _unwinding_on_sigterm():
            code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a reader that went away must show here, not at interpreter exit
        return code or 0
    except SystemExit as exit_:  # argparse has already said what there is to say
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough. Python flushes stdout once more at exit, so give
        # it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except PPLLaVAError as error:
        return _report(str(error), error.exit_code)
    except OSError as error:
        return _report(str(error), StorageError.exit_code)
    except Exception as error:
        sentence = f"{type(error).__name__}: {error} (a bug; {DEBUG_VARIABLE}=1 shows where)"
        return _report(sentence, InternalError.exit_code)


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM raise SystemExit in the block, unless someone has decided about it already."""
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _report(sentence: str, exit_code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exc()
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return exit_code
