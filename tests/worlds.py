"""Environments for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from harmony_core.environments import Environment, EnvironmentFactory, Limits
from harmony_core.graders import Grade
from harmony_core.text.threads import StringThread

Reaction = tuple[StringThread | None, list[Grade] | None]
React = Callable[["Scripted", StringThread, int], Any]


def grade(value: float) -> list[Grade]:
    return [Grade(value, "test")]


class Scripted(Environment):
    """Reacts as a function of the thread and the number of the turn, from 1."""

    def __init__(self, log: Callable[..., Any], react: React, metadata: Any) -> None:
        super().__init__(log)
        self.react, self.metadata, self.turn = react, metadata, 0

    async def react_to(self, thread: StringThread) -> Reaction:
        self.turn += 1
        found = self.react(self, thread, self.turn)
        reaction: Reaction = await found if asyncio.iscoroutine(found) else found
        return reaction


class Factory(EnvironmentFactory):
    """Makes scripted environments and keeps them."""

    def __init__(self, react: React, limits: Limits | None = None) -> None:
        super().__init__()
        self.react, self.limits = react, limits
        self.made: list[Scripted] = []

    def create_environment(self, metadata: Any) -> Environment:
        self.made.append(Scripted(self.add_log, self.react, metadata))
        return self.made[-1]


def answers(count: int, value: Callable[[StringThread], float] = lambda thread: 1.0) -> React:
    """The tool answers `count - 1` times; then the trajectory ends with a grade."""

    def react(world: Scripted, thread: StringThread, turn: int) -> Reaction:
        world.logging_function("turns", turn)
        return (None, grade(value(thread))) if turn == count else (thread.tool(f"value {turn}"), None)

    return react
