from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest

from ppllava_engines import errors
from ppllava_engines.errors import PPLLaVAError, run_command


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.DataError, 65),
        (errors.NotFoundError, 66),
        (errors.UnavailableError, 69),
        (errors.SandboxError, 69),
        (errors.InternalError, 70),
        (errors.StorageError, 74),
        (errors.IncompatibleError, 78),
    ],
)
def test_each_failure_has_its_code_and_one_line(
    kind: type[PPLLaVAError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> None:
        raise kind(f"{argv[0]}: got 1,\n  expected 2")

    assert run_command(main, ["clip"]) == code
    assert capsys.readouterr() == ("", "error: clip: got 1, expected 2\n")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("why"), 1, ""),
        (FileNotFoundError(2, "gone", "a.mp4"), 74, "error: [Errno 2] gone: 'a.mp4'\n"),
        (
            ZeroDivisionError("by zero"),
            70,
            "error: ZeroDivisionError: by zero (a bug; PPLLAVA_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_other_exceptions(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Sequence[str]) -> None:
        raise raised

    assert run_command(main, []) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_success_is_what_main_returns(returned: int | None, code: int) -> None:
    assert run_command(lambda _: returned, []) == code


def test_arguments_default_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "a", "b"])
    assert run_command(lambda argv: len(argv)) == 2


def test_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Sequence[str]) -> None:
        raise errors.DataError("bad")

    run_command(main, [])
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("PPLLAVA_DEBUG", "1")
    run_command(main, [])
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("\nerror: bad\n")


def test_sigterm_unwinds_a_command_and_only_it(capsys: pytest.CaptureFixture[str]) -> None:
    unwound: list[bool] = []

    def main(_: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run_command(main, []) == 143
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capsys.readouterr() == ("", "")


def test_who_handles_sigterm_already_goes_on_doing_so() -> None:
    def handled() -> object:
        found: list[object] = []
        run_command(lambda _: found.append(signal.getsignal(signal.SIGTERM)), [])
        return found[0]

    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert handled() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda _: 3, [])))
    thread.start()
    thread.join()
    assert codes == [3]


def test_a_reader_that_goes_away_is_no_failure_to_tell() -> None:
    script = (
        "import sys; from ppllava_engines.errors import run_command\n"
        "sys.stdin.read()\n"
        "sys.exit(run_command(lambda argv: print('x' * 100)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        process.stdout.close()  # before it may write
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
