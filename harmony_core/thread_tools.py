"""Small things that recipes do with threads: copy them, show them, give them another system prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from harmony_core.errors import DataError
from harmony_core.threads import StringThread


def repeat_thread(thread: StringThread) -> Iterator[StringThread]:
    """The thread again and again, each time as a copy with metadata of its own."""
    stored = thread.to_json()
    while True:
        again = StringThread.from_json(stored)
        again.metadata = copy.deepcopy(thread.metadata)
        yield again


def stringify_thread(thread: StringThread, sep: str = "\n\n") -> str:
    """The thread as text: `[role]`, a line break and the content for each turn, joined by `sep`."""
    return sep.join(f"[{turn.role}]\n{turn.content}" for turn in thread.get_turns())


def override_system_prompt(dataset: Iterable[StringThread], system_prompt: str) -> list[StringThread]:
    """The threads with this one system turn in place of their own; the last turn has weight 1, as in a new thread.

    Raises DataError for a thread with anything but text.
    """
    return [_with_system_prompt(thread, system_prompt) for thread in dataset]


def _with_system_prompt(thread: StringThread, system_prompt: str) -> StringThread:
    for role, fragments in thread.get_fragments():
        other = {fragment["type"] for fragment in fragments} - {"text"}
        if other:
            raise DataError(
                f"override_system_prompt takes threads of text; a {role} turn has {', '.join(sorted(other))}"
            )
    turns = [(turn.role, turn.content) for turn in thread.get_turns() if turn.role != "system"]
    return StringThread([("system", system_prompt), *turns], thread.metadata)
