"""Tracebacks for people: the author's frames with their source; ours and the libraries' are folded to a count."""

from __future__ import annotations

import asyncio
import itertools
import linecache
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import harmony_core

MAX_FRAMES = 12


@dataclass(frozen=True)
class Frame:
    """One call in a traceback."""

    filename: str
    line: int
    function: str

    @property
    def source(self) -> str:
        """The line of code."""
        return linecache.getline(self.filename, self.line).strip()


def frames_in(trace: TracebackType | None) -> list[Frame]:
    """Every frame, outermost first."""
    summary = traceback.extract_tb(trace)
    return [Frame(frame.filename, frame.lineno or 0, frame.name) for frame in summary]


def is_own(frame: Frame) -> bool:
    """Whether the frame is the author's, as opposed to ours, the standard library's or an installed package's."""
    if frame.filename.startswith("<"):
        return False
    path = Path(frame.filename)
    if path.is_relative_to(_BUILT_IN):  # a built-in recipe counts as a user's
        return True
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return False
    return not any(path.is_relative_to(folder) for folder in _FOREIGN)


def _foreign() -> list[Path]:
    ours = Path(harmony_core.__file__).parent
    return [ours, ours.parent / "cli", ours.parent / "adaptive_harmony", Path(asyncio.__file__).parent.parent]


_FOREIGN = _foreign()
_BUILT_IN = Path(harmony_core.__file__).parent / "recipes"


def describe(error: BaseException) -> list[str]:
    """Lines with the exception and its place in the author's code, followed by its causes."""
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    prefix = ""
    while current is not None and id(current) not in seen and len(seen) < 5:
        seen.add(id(current))
        lines.append(prefix + summary(current))
        lines += _folded(frames_in(current.__traceback__))
        lines += [f"  note: {note}" for note in getattr(current, "__notes__", ())]
        if isinstance(current, BaseExceptionGroup):
            for inner in current.exceptions[:5]:
                lines += [f"  {line}" for line in describe(inner)]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        prefix = "caused by " if seen else ""
    return lines


def summary(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero`."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException) -> str | None:
    """`file:line` of the author's innermost frame."""
    own = [frame for frame in frames_in(error.__traceback__) if is_own(frame)]
    return f"{own[-1].filename}:{own[-1].line}" if own else None


def callers_line(otherwise: str) -> str:
    """file:line of the nearest caller in the author's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        here = Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        if is_own(here):
            return f"{Path(here.filename).name}:{here.line}"
        frame = frame.f_back
    return otherwise


def _folded(frames: list[Frame]) -> Iterator[str]:
    """The frames from the author's first frame on; the frames before it are always ours."""
    first = next((i for i, frame in enumerate(frames) if is_own(frame)), len(frames))
    shown = 0
    for own, group in itertools.groupby(frames[first:], is_own):
        if not own:
            hidden = len(list(group))
            yield f"  ... {hidden} frame{'s' if hidden > 1 else ''} below the recipe ..."
            continue
        for frame in group:
            if shown == MAX_FRAMES:
                yield "  ..."
                return
            shown += 1
            yield f"  {frame.filename}:{frame.line} in {frame.function}"
            if frame.source:
                yield f"      {frame.source}"
