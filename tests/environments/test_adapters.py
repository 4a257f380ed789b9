"""Environments of other interfaces, as their packages define them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harmony_core.environments import GymEnvironment, VerifiersEnvironment
from harmony_core.errors import DataError
from harmony_core.text.threads import StringThread


class Guess:
    """Gymnasium's interface: guess a number."""

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.number, self.steps = seed or 0, 0
        return "guess", {}

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        right = action == self.number
        return "higher" if action < self.number else "lower", float(right), right, self.steps == 3, {}


def log(key: str, value: float) -> None: ...


def test_gymnasium() -> None:
    async def run() -> None:
        world = GymEnvironment(log, Guess(), action=int, seed=5)
        thread = await world.initialize_state(StringThread([("system", "Guess.")]))
        assert thread.get_turns()[-1] == ("user", "guess")
        following, grades = await world.react_to(thread.assistant("3"))
        assert following is not None and following.last_content() == "higher" and grades and grades[0].value == 0.0
        assert (await world.react_to(following.assistant("5")))[0] is None
        world.env.steps = 2
        assert (await world.react_to(following.assistant("6")))[0] is None, "truncated"
        with pytest.raises(ValueError, match="five"):
            await world.react_to(following.assistant("five"))

    asyncio.run(run())


class Rubric:
    async def score_rollout(self, state: dict[str, Any]) -> None:
        state["reward"] = float(state["completion"][-1]["content"] == state["answer"])


class Twice:
    """The interface of a MultiTurnEnv: two turns of the model."""

    rubric = Rubric()
    role = "user"

    async def setup_state(self, state: dict[str, Any]) -> None:
        state["told"] = "more"

    async def is_completed(self, state: dict[str, Any]) -> bool:
        return len(state["trajectory"]) == 2

    async def env_response(self, messages: list[Any], state: dict[str, Any]) -> list[dict[str, str]]:
        assert [m["role"] for m in messages] == ["user", "assistant"]
        return [{"role": self.role, "content": state["told"], "tool_call_id": "1"}]


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_verifiers(role: str) -> None:
    async def run() -> None:
        env = Twice()
        env.role = role
        world = VerifiersEnvironment(log, env, answer="b")
        thread = await world.initialize_state(StringThread([("user", "q")]))
        if role == "system":
            with pytest.raises(DataError, match="role 'system'"):
                await world.react_to(thread.assistant("a"))
            return
        following, grades = await world.react_to(thread.assistant("a"))
        assert following is not None and grades is None and following.turns[-1].role == role
        ended, grades = await world.react_to(following.assistant("b"))
        assert ended is None and grades and grades[0].value == 1.0

    asyncio.run(run())
