"""Thin adapters to environments of other interfaces, which are known by their methods: no package is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harmony_core.environments.environment import Environment, called
from harmony_core.errors import DataError
from harmony_core.graders import Grade
from harmony_core.text.threads import StringThread

Reaction = tuple[StringThread | None, list[Grade] | None]


class GymEnvironment(Environment):
    """An environment with Gymnasium's `reset() -> (observation, info)` and
    `step(action) -> (observation, reward, terminated, truncated, info)`.

    Observations become the text of user turns. `action` makes an action of the model's text. Each turn has the step's
    reward. `reset` and `step` are called in threads, and may block.
    """

    def __init__(
        self, logging_function: Callable[..., Any], env: Any, action: Callable[[str], Any] = str, **reset: Any
    ) -> None:
        super().__init__(logging_function)
        self.env, self.action, self.reset_arguments = env, action, reset

    async def initialize_state(self, thread: StringThread) -> StringThread:
        """The prompt, followed by the first observation."""
        observation, _ = await called(lambda: self.env.reset(**self.reset_arguments))
        return thread.user(str(observation))

    async def react_to(self, thread: StringThread) -> Reaction:
        """Take a step."""
        observation, reward, terminated, truncated, _ = await called(self.env.step, self.action(thread.last_content()))
        return None if terminated or truncated else thread.user(str(observation)), [Grade(reward, "gym")]


class VerifiersEnvironment(Environment):
    """A `MultiTurnEnv` of verifiers 0.1: `setup_state`, `env_response`, `is_completed`, and a rubric that scores.

    `row` has the fields of a dataset's row that the rubric reads, such as `answer` and `info`. The last turn has the
    rubric's reward. Verifiers 0.4 has no such class; its task sets drive models through servers of their own.
    """

    def __init__(self, logging_function: Callable[..., Any], env: Any, **row: Any) -> None:
        super().__init__(logging_function)
        self.env = env
        self.state: dict[str, Any] = {"completion": [], "trajectory": [], "turn": 0, "info": {}, "task": "", **row}

    async def initialize_state(self, thread: StringThread) -> StringThread:
        """The prompt, which the environment's state gets."""
        self.state["prompt"] = [{"role": role, "content": text} for role, text in thread.get_turns()]
        self.state = await self.env.setup_state(self.state) or self.state
        return thread

    async def react_to(self, thread: StringThread) -> Reaction:
        """The environment's messages, or the rubric's reward."""
        state = self.state
        said = {"role": "assistant", "content": thread.last_content()}
        before = [*state["prompt"], *state["completion"]]
        state["trajectory"].append({"prompt": before, "completion": [said]})
        state["completion"].append(said)
        state["turn"] += 1
        if not await self.env.is_completed(state):
            answer = await self.env.env_response([*before, said], state)
            messages = answer[0] if isinstance(answer, tuple) else answer
            state["completion"] += messages
            if state.get("final_env_response") is None and messages:
                for message in messages:
                    thread = _appended(thread, message)
                return thread, None
        await self.env.rubric.score_rollout(state)
        return None, [Grade(state["reward"], "verifiers")]


def _appended(thread: StringThread, message: Any) -> StringThread:
    """The thread with a message, a mapping or an object with the same fields."""
    fields = message if isinstance(message, dict) else vars(message)
    if fields["role"] == "tool":
        return thread.tool(str(fields["content"]), fields.get("tool_call_id"))
    if fields["role"] != "user":
        raise DataError(f"an environment's message has the role {fields['role']!r}", hint="it may be user or tool")
    return thread.user(str(fields["content"]))
