from __future__ import annotations

import asyncio
from itertools import islice

import pytest

from harmony_core.errors import DataError
from harmony_core.thread_tools import override_system_prompt, repeat_thread, stringify_thread
from harmony_core.threads import StringThread


def test_repeated_threads_are_independent_copies() -> None:
    thread = StringThread(
        [("user", "q"), ("assistant", "a")], metadata={"labels": [1]}
    ).with_weight_all_assistant_turns()
    first, second = islice(repeat_thread(thread), 2)
    assert first.get_turns() == second.get_turns() == thread.get_turns()
    assert first.get_turn_weights() == thread.get_turn_weights()
    first.metadata["labels"].append(2)
    assert second.metadata == thread.metadata == {"labels": [1]}


def test_a_thread_as_text() -> None:
    thread = StringThread([("system", "s"), ("user", "q\nr")])
    assert stringify_thread(thread) == "[system]\ns\n\n[user]\nq\nr"
    assert stringify_thread(thread, sep=" | ") == "[system]\ns | [user]\nq\nr"


def test_another_system_prompt() -> None:
    threads = [
        StringThread([("system", "a"), ("user", "q"), ("system", "b")], metadata={"k": 1}),
        StringThread([("user", "r")]),
    ]
    first, second = override_system_prompt(threads, "new")
    assert first.get_turns() == [("system", "new"), ("user", "q")]
    assert first.metadata == {"k": 1}
    assert first.get_turn_weights() == [0.0, 1.0]
    assert second.get_turns() == [("system", "new"), ("user", "r")]


def test_what_would_be_lost_is_refused() -> None:
    fragments = [("assistant", [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}])]
    thread = asyncio.run(StringThread.from_fragments(fragments))
    with pytest.raises(DataError, match="assistant turn has reasoning"):
        override_system_prompt([thread], "new")
