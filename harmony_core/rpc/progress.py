"""Progress within a phase: what takes long says so piece by piece, and a rank that hangs is silent about it.

A process is one rank with one engine thread, so there is one listener: its channel, whose beats carry the news.
"""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[], None] | None = None


def report_to(listener: Callable[[], None]) -> None:
    """Have `listener` called for every piece from now on; it must be quick."""
    global _listener
    _listener = listener


def made(*_: object) -> None:
    """A piece is done: a layer, what a compiler made for it, a tensor read or written, a collective."""
    if _listener is not None:
        _listener()
