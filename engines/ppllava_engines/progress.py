"""What long commands show: a bar on a terminal, nothing where their output goes elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage_bar(title: str, total: int) -> Iterator[Callable[[str, bool], None] | None]:
    """Yields what to call with what is at hand, and whether that is the next of `total` stages.

    None where stderr is no terminal.
    """
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
        # The first stage begins; none is over.
        task = bar.add_task(title, total=total, completed=-1)

        def show(stage: str, is_next: bool) -> None:
            bar.update(task, description=stage, advance=int(is_next))

        yield show
