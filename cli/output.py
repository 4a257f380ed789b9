"""Lines for people on stderr, data on stdout, and the one object of `--json`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any


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
    return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)


def _encodable(text: str, stream: IO[str]) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


@contextlib.contextmanager
def diverted(json: bool) -> Iterator[None]:
    """With `json`, what is written to stdout meanwhile, by subprocesses too, goes to stderr; else nothing changes."""
    if not json:
        yield
        return
    stream, saved = sys.stdout, None
    _flush()
    with contextlib.suppress(OSError):  # stdout or stderr is closed
        saved = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
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
