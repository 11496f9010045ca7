"""`ppllava-export CHECKPOINT OUT`: a checkpoint folder → a bundle, with its parity table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ppllava_engines.errors import run_command

from . import STAGES, export_bundle


def main(argv: Sequence[str]) -> None:
    """Exports one checkpoint and prints how far its graphs are from torch.

    Args:
        argv: The arguments without the program's name.

    Raises:
        PPLLaVAError: The export failed; see `export_bundle`.
        SystemExit: `--help`, or arguments that are not understood.
    """
    args = _parser().parse_args(argv)
    with _progress() as on_stage:
        export_bundle(
            args.checkpoint,
            args.out,
            "fp16" if args.fp16 else "fp32",
            skip_tokenizer=args.skip_tokenizer,
            overwrite=args.overwrite,
            on_stage=on_stage,
        )
    from rich.console import Console

    from .report import Parity

    Console().print(Parity.read(args.out).table())


def run() -> int:
    """Returns the exit code of the command with the process's arguments."""
    return run_command(main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-export",
        description="Make a bundle that runs without torch out of a trained PPLLaVA checkpoint.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--fp16", action="store_true", help="float16 graphs, float32 where it matters"
    )
    parser.add_argument(
        "--skip-tokenizer",
        action="store_true",
        help="export a checkpoint without tokenizer files",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the bundle that is in OUT"
    )
    return parser


@contextmanager
def _progress() -> Iterator[Callable[[str], None] | None]:
    """Yields what to call at each stage: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # The stream itself: libraries are kept quiet by swapping sys.stderr meanwhile.
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, redirect_stdout=False,
                  redirect_stderr=False, transient=True) as bar:  # fmt: skip
        task = bar.add_task("exporting", total=len(STAGES), completed=-1)

        def on_stage(stage: str) -> None:
            bar.update(task, description=stage, advance=1)

        yield on_stage


if __name__ == "__main__":
    sys.exit(run())
