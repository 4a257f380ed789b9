"""How far a run is, on stderr: a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harmony_core.notifiers import PlainProgress, ProgressSink


@contextmanager
def progress(quiet: bool) -> Iterator[ProgressSink]:
    """A sink for stages: `(stage, done, total)`."""
    if quiet:
        yield lambda stage, done, total: None
    elif not _is_terminal():
        yield PlainProgress()
    else:
        yield from _bars()


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def _bars() -> Iterator[ProgressSink]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, force_interactive=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        # A recipe's prints pass above the bar only where both are the same terminal.
        redirect_stdout=sys.stdout.isatty() or sys.stdout is sys.stderr,
    )
    tasks: dict[str, TaskID] = {}

    def sink(stage: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()  # with the first stage: a recipe without stages has no empty bar
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total or None)
        bars.update(tasks[stage], completed=done, total=total or None)

    try:
        yield sink
    finally:
        if tasks:
            bars.stop()
