"""Environments: they react to each turn of a model and grade it, until the trajectory ends.

The code of an environment is foreign. An error in it, or no answer in time, concerns its trajectory alone.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from harmony_core.environments.history import GradeAggregator, TrajectoryHistory, mean_of_grade_values
from harmony_core.errors import (
    DataError,
    EngineError,
    EnvironmentFailed,
    EnvironmentTimeout,
    PromptTooLong,
    TokenizationError,
    UsageError,
)
from harmony_core.graders import Grade
from harmony_core.loggers.base import Table
from harmony_core.rpc.tracebacks import place_of, summary
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.turns import TokenTurn

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Where a trajectory ends at the latest: a number of turns of the model, tokens of a thread, and seconds.

    In training a thread never has more tokens than the models can train. `react_seconds` is the time for each call of
    the environment; a trajectory whose environment takes longer is dropped. One that reaches another limit is
    truncated: it counts as it is, and its last turn has the reward 0 if the environment gave none.
    """

    turns: int = 32
    tokens: int | None = None
    react_seconds: float = 60.0
    seconds: float = 1800.0


Reaction = tuple[StringThread | None, list[Grade] | None]


class Environment(ABC):
    """The world in one trajectory. A subclass implements `react_to`, and `initialize_state` if it has a beginning.

    `limits` may be replaced in a subclass, or for all environments of a factory.
    """

    limits: Limits = Limits()

    def __init__(self, logging_function: Callable[..., Any]) -> None:
        self.logging_function = logging_function

    @abstractmethod
    async def react_to(self, thread: StringThread) -> Reaction:
        """React to the model's turn, the thread's last. Returns the thread to answer next, and the turn's grades.

        The trajectory ends when the thread is None; the turn must then have grades, which may be None otherwise. A
        plain method is called in a thread of its own, and may block.
        """

    async def initialize_state(self, thread: StringThread) -> StringThread:
        """The thread with which the trajectory begins, made from the prompt."""
        return thread

    async def generate_trajectory_and_grade(
        self, model: InferenceModel, initial_thread: StringThread, aggregator: GradeAggregator = mean_of_grade_values
    ) -> tuple[list[StringThread], TrajectoryHistory]:
        """Let the model and the environment take turns until the environment ends it, or a limit is reached.

        A thread goes on as long as the next one begins with it; otherwise a new thread begins. The turns that the
        model generated have weight 1, and keep the tokens as they were drawn (`TrajectoryHistory.sampled`). Raises
        EnvironmentFailed when the environment raises or breaks its contract, EnvironmentTimeout when it hangs,
        PromptTooLong when the first prompt leaves no room.
        """
        history = TrajectoryHistory(aggregator)
        with model.own_seeds():
            history.sampled = [part async for part in _Segments(self, model, history).play(initial_thread)]
        return [await model.detokenize_thread(part) for part in history.sampled], history


class _Segments:
    """One trajectory in progress, cut into threads that each grow by appending tokens."""

    def __init__(self, environment: Environment, model: InferenceModel, history: TrajectoryHistory) -> None:
        self._environment, self._history = environment, history
        self._limits = environment.limits
        tokens = self._limits.tokens
        self._model = model if tokens is None else model.max_seqlen(tokens, "limits.tokens")
        self._drawn: dict[int, TokenTurn] = {}
        """The turns that the model generated in the present thread, by their places among its turns."""

    async def play(self, thread: StringThread) -> AsyncIterator[TokenizedThread]:
        """Yield each thread with the tokens as they were drawn."""
        history, deadline = self._history, time.monotonic() + self._limits.seconds
        thread = await self._foreign(self._begin(thread))
        current: TokenizedThread | None = None
        history.add_new_thread()
        while True:
            try:
                answer = await self._model.generate_tokens(thread)
            except PromptTooLong:
                if current is None:
                    raise
                history.truncated = "tokens"
                break
            if current is not None and not _extends(answer, current):
                yield self._weighted(current)
                self._drawn = {}
                history.add_new_thread()
            current = answer
            self._drawn[len(answer.token_turns) - 1] = answer.token_turns[-1]
            text = await self._model.detokenize_thread(answer)
            following, grades = await self._foreign(self._react(text))
            history.add_turn(grades)
            if following is None:
                break
            thread = _continued(text, following)
            if history.total_number_of_turns_generated >= self._limits.turns or time.monotonic() > deadline:
                history.truncated = "seconds" if time.monotonic() > deadline else "turns"
                break
        if history.truncated and history.threads[-1].turns[-1] is None:
            history.threads[-1].turns[-1] = [Grade(0.0, "truncated")]
        yield self._weighted(current)

    async def _begin(self, thread: StringThread) -> StringThread:
        return _thread(await called(self._environment.initialize_state, thread))

    async def _react(self, thread: StringThread) -> Reaction:
        following, grades = await called(self._environment.react_to, thread)
        graded = isinstance(grades, list) and all(isinstance(g, Grade) and math.isfinite(g.value) for g in grades)
        if not graded and (grades is not None or following is None):
            what = "react_to must give grades as a list of Grade with finite values; None if the trajectory goes on"
            raise ValueError(f"{what}, not {grades!r}")
        return None if following is None else _thread(following), grades

    async def _foreign(self, work: Awaitable[T]) -> T:
        return await within(self._limits.react_seconds, type(self._environment).__name__, work)

    def _weighted(self, thread: TokenizedThread) -> TokenizedThread:
        """The thread with weight 1 for the turns that were drawn, at the places at which they were drawn."""
        turns = [self._drawn.get(i, replace(turn, weight=0.0)) for i, turn in enumerate(thread.token_turns)]
        return TokenizedThread.of(thread, thread.token_ids, turns)


def _continued(text: StringThread, following: StringThread) -> StringThread:
    """The environment's thread; turns at its beginning that equal those of `text` keep their drawn tokens."""
    count = len(text.turns)
    if not _same(text, following):
        return following
    kwargs = text.template_kwargs | following.template_kwargs
    metadata = text.metadata if following.metadata is None else following.metadata
    return StringThread.from_turns((*text.turns, *following.turns[count:]), metadata, text.uuid(), kwargs)


def _same(text: StringThread | TokenizedThread, following: StringThread | TokenizedThread) -> bool:
    """Whether the second thread begins with the roles and fragments of the first."""
    first, second = ([(t.role, t.fragments) for t in thread.text_turns] for thread in (text, following))
    return second[: len(first)] == first


def _extends(answer: TokenizedThread, before: TokenizedThread) -> bool:
    """Whether an answer's thread begins with the turns and the tokens of the one before."""
    return answer.token_ids[: len(before.token_ids)] == before.token_ids and _same(before, answer)


def _thread(found: Any) -> StringThread:
    if not isinstance(found, StringThread):
        raise TypeError(f"an environment gives StringThreads, not {type(found).__name__}")
    return found


async def called(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a coroutine function, or of a plain one, which is called in a daemon thread of its own."""
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Any] = loop.create_future()

    def settle(method: str, value: Any) -> None:
        if not found.done():
            getattr(found, method)(value)

    def work() -> None:
        try:
            ended = "set_result", function(*args)
        except Exception as error:  # foreign code: raised where it is awaited
            ended = "set_exception", error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *ended)

    threading.Thread(target=work, daemon=True).start()
    result = await found
    return await result if inspect.isawaitable(result) else result


async def within(seconds: float | None, name: str, work: Awaitable[T]) -> T:
    """The result of foreign code. Raises EnvironmentTimeout, and EnvironmentFailed for errors that are not of a sample.

    Code that refuses to be cancelled is left alone, so that it holds up nothing.
    """

    async def guarded() -> T:
        try:
            return await work
        except SystemExit as error:
            raise EnvironmentFailed(f"{name} raised {error!r}") from error

    task = asyncio.ensure_future(guarded())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()
    if not task.done():
        # Else the end of the event loop waits for it, or tells of it.
        asyncio._unregister_task(task)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        raise EnvironmentTimeout(f"{name} took longer than {seconds:g} s", hint="raise limits.react_seconds")
    if task.cancelled():
        raise EnvironmentFailed(f"{name} was cancelled from within")
    try:
        return task.result()
    except (EngineError, DataError, TokenizationError):
        raise
    except Exception as error:  # foreign code: its failure concerns one trajectory
        place = place_of(error)
        raise EnvironmentFailed(f"{name} raised {summary(error)}" + (f" ({place})" if place else "")) from error


class EnvironmentFactory(ABC):
    """Makes an environment for each trajectory, and gathers what they log.

    `limits`, if set, replace those of the environments. With `logging_name`, keys of logs are `<logging_name>/<key>`.
    """

    limits: Limits | None = None

    def __init__(self, logging_name: str | None = None) -> None:
        self.logging_name = logging_name
        self._logs: dict[str, list[float | Table]] = {}

    @abstractmethod
    def create_environment(self, metadata: Any) -> Environment:
        """A new environment for a thread with this metadata."""

    async def play(
        self, model: InferenceModel, thread: StringThread
    ) -> tuple[list[TokenizedThread], TrajectoryHistory]:
        """One trajectory in a new environment: its threads with their tokens, and its grades.

        Raises as `Environment.generate_trajectory_and_grade`.
        """

        async def generate() -> tuple[list[StringThread], TrajectoryHistory]:
            environment = self.create_environment(thread.metadata)
            environment.limits = self.limits or environment.limits
            return await environment.generate_trajectory_and_grade(model, thread)

        with model.own_seeds():
            threads, history = await within(None, type(self).__name__, generate())
            return history.sampled or [await model.tokenize_thread(one) for one in threads], history

    def add_log(self, key: str, new_value: float | Table) -> None:
        """Add a number or a table under a key. Raises UsageError for anything else."""
        if not isinstance(new_value, int | float | Table):
            raise UsageError(f"a log is a number or a Table, not {type(new_value).__name__}: {key}")
        self._logs.setdefault(f"{self.logging_name}/{key}" if self.logging_name else key, []).append(new_value)

    def get_logs(self, clear: bool = False) -> dict[str, float | Table]:
        """For each key the mean of its numbers, or its tables joined."""
        found = {key: _summed(values) for key, values in self._logs.items()}
        if clear:
            self.clear_logs()
        return found

    def clear_logs(self) -> None:
        """Forget what was added."""
        self._logs = {}


def _summed(values: Sequence[float | Table]) -> float | Table:
    numbers = [float(value) for value in values if not isinstance(value, Table)]
    if numbers:
        return fmean(numbers)
    tables = [value for value in values if isinstance(value, Table)]
    joined = Table(tables[0].headers)
    for table in tables:
        joined.add_rows(table.rows())
    return joined
