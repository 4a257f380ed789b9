"""Lines for people and progress on stderr, data on stdout, and the one object of `--json`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harmony_core.plain_data import plain

if TYPE_CHECKING:
    from harmony_core.notifiers import ProgressSink

    from .streams import Streams


def clean(text: str) -> str:
    """Text without control characters, which could rewrite what a terminal shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def tell(text: str) -> None:
    """One line for people."""
    # Looked up for each line: a progress bar puts its own stream in place.
    stream = sys.stderr
    stream.write(_encodable(clean(text), stream) + "\n")
    stream.flush()


def tell_errors(errors: Iterable[dict[str, Any]]) -> None:
    """The errors of an outcome. Several issues of one error are each marked."""
    for error in errors:
        lines = list(error["lines"])
        issues = error.get("details", {}).get("errors")
        marked = len(issues) if isinstance(issues, list) else 1
        for line in lines[:marked]:
            tell(f"error: {line}")
        for line in lines[marked:]:
            tell(line)


def tell_result(outcome: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """What a finished run leaves on the terminal beside its errors: its result on stdout, the rest on stderr."""
    for gate in outcome["gates"]:
        held = "holds" if gate["passed"] else "does not hold"
        if not quiet or not gate["passed"]:
            tell(f"gate {gate['name']}: {gate['value']} {gate['op']} {gate['threshold']} {held}")
    for model in () if quiet else outcome["models"]:
        tell(f"saved {model.get('ref')}")
    result = outcome["result"]
    if not as_json and result is not None:
        data(result if isinstance(result, str) else dumped(result))


def tell_plan(outcome: dict[str, Any], recipe: Path, models: dict[str, Any]) -> None:
    """The plan that a dry run made, on stdout."""
    data(f"recipe   {recipe}")
    for field, model in models.items():
        data(f"model    {field}: {model['ref']} ({model['digest'][:19]})")
    for spawn in outcome.get("plan", ()):
        data(_spawn(spawn))
        if spawn.get("room_for_copy") is False:
            tell(f"{spawn['name']}: no room for a copy of it (the reference of GRPO, GSPO, PPO and DPO)")
    for rows in outcome.get("rows", ()):
        data(f"rows     {rows['name']}: {rows['text']}")
    if outcome["exit"] == 0:
        where = outcome.get("planned_until")
        data(f"planned  {'up to ' + where if where else 'to the end of the recipe'}; nothing was started")


def _spawn(spawn: dict[str, Any]) -> str:
    from harmony_core.memory.ledger import format_size

    limits = [f"tp={spawn['tp']}", f"replicas={spawn['replicas']}"]
    limits += [f"{name}={spawn[name]}" for name in ("max_batch_size", "kv_cache_len") if spawn.get(name)]
    sizes = spawn.get("bytes", {})
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items() if size and name != "total")
    kind = f"{spawn['kind']}{' with adapter' if spawn.get('adapter') else ''}"
    return (
        f"spawn    {spawn['name']}: {spawn['model']} for {kind}, {' '.join(limits)}\n"
        f"         {format_size(sizes.get('total', 0))} per rank: {parts}"
    )


def data(text: str) -> None:
    """Text for stdout."""
    sys.stdout.write(_encodable(text, sys.stdout) + "\n")
    sys.stdout.flush()


def answer(as_json: bool, values: dict[str, Any], *lines: str, ok: bool = True, code: int = 0) -> None:
    """The result of a command that is no run: one object on stdout, or these lines."""
    for line in (dumped({"ok": ok, "exit": code} | values),) if as_json else lines:
        data(line)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def dumped(value: Any) -> str:
    """One line of JSON that any parser takes."""
    return json.dumps(plain(value), ensure_ascii=False)


def _encodable(text: str, stream: IO[str]) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


@contextlib.contextmanager
def diverted(json: bool, streams: Streams) -> Iterator[None]:
    """With `json`, what is written to stdout meanwhile, by subprocesses too, goes to stderr; else nothing changes."""
    if not json:
        yield
        return
    stream, saved = sys.stdout, None
    _flush()
    with contextlib.suppress(OSError):  # stdout or stderr is closed
        saved = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = streams.for_prints_on_stderr()
    try:
        yield
    finally:
        _flush()
        sys.stdout = stream
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


@contextlib.contextmanager
def progress(quiet: bool, streams: Streams) -> Iterator[ProgressSink]:
    """A sink for stages: `(stage, done, total)`."""
    if quiet:
        yield lambda stage, done, total: None
    elif not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        from harmony_core.notifiers import PlainProgress

        yield PlainProgress()
    else:
        yield from _bars(streams)


def _bars(streams: Streams) -> Iterator[ProgressSink]:
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(
        file=streams.beside, force_interactive=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False
    )
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks: dict[str, TaskID] = {}

    class Above(FileProxy):
        """What is printed passes above the bars, and is kept."""

        def __init__(self, name: str) -> None:
            super().__init__(console, getattr(sys, name))
            self.kept = streams.kept[name]

        def write(self, text: str) -> int:
            self.kept.write(text.encode("utf-8", "backslashreplace"))
            super().write(text)
            return len(text)

    def sink(stage: str, done: int, total: int) -> None:
        if not tasks:
            # A recipe's prints pass above the bars only where both are the same terminal.
            if sys.stdout.isatty():
                above.enter_context(contextlib.redirect_stdout(Above("stdout")))
            above.enter_context(contextlib.redirect_stderr(Above("stderr")))
            bars.start()  # with the first stage: a recipe without stages has no empty bar
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total or None)
        bars.update(tasks[stage], completed=done, total=total or None)

    with contextlib.ExitStack() as above:
        above.callback(bars.stop)
        yield sink
