"""Trajectories of a live model: their tokens, threads, grades and limits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from engines import LiveEngine
from harmony_core.client import TrainingModel
from harmony_core.environments import Limits, TrajectoryHistory
from harmony_core.environments.environment import within
from harmony_core.errors import EnvironmentFailed, EnvironmentTimeout, PromptTooLong
from harmony_core.graders import Grade
from harmony_core.text.threads import StringThread, TokenizedThread
from worlds import Factory, Scripted, answers, grade

T = TypeVar("T")
PROMPT = StringThread([("user", "hi")], {"key": 7})
Played = tuple[list[TokenizedThread], TrajectoryHistory]


@asynccontextmanager
async def policy(engine: LiveEngine, name: str = "world", **options: Any) -> AsyncIterator[TrainingModel]:
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=4096, tokens_to_generate=6)
    model = await builder.spawn_train(name, max_batch_size=options.pop("max_batch_size", 400))
    try:
        yield model
    finally:
        await model.dealloc()


def play(engine: LiveEngine, factory: Factory, prompt: StringThread = PROMPT, **options: Any) -> Played:
    async def work() -> Played:
        async with policy(engine, **options) as model:
            limit = options.get("max_batch_size", 400)
            return await factory.play(model.max_seqlen(limit, "max_batch_size"), prompt)

    return engine.run(work())


def test_a_thread_holds_the_tokens_as_they_were_drawn_and_weighs_only_them(one_rank: LiveEngine) -> None:
    seen: list[list[int]] = []

    async def work() -> tuple[Played, list[list[int]], list[int]]:
        async with policy(one_rank) as model:
            request = type(model)._request_generation

            async def noting(self: Any, prompt: list[int], seed: int) -> Any:
                answer = await request(self, prompt, seed)
                seen.append(prompt)
                return answer

            type(model)._request_generation = noting  # type: ignore[method-assign]
            try:
                played = await Factory(answers(3)).play(model, PROMPT)
            finally:
                type(model)._request_generation = request  # type: ignore[method-assign]
            (thread,) = played[0]
            scored = await model.logprobs_per_token(thread)
            assert scored == pytest.approx(thread.logprobs, abs=1e-4)
            again = await model.tokenize_thread(await model.detokenize_thread(thread))
            return played, seen, again.token_ids

    ((thread,), history), prompts, again = one_rank.run(work())
    drawn = [turn.generation.tokens for turn in thread.token_turns if turn.generation]
    assert len(drawn) == len(prompts) == 3
    assert thread.token_ids == [*prompts[-1], *drawn[-1]], "the last prompt and its completion"
    assert [tuple(thread.token_ids[t.start : t.end]) for t in thread.token_turns if t.weight] == drawn
    assert sum(w > 0 for w in thread.token_weights) == sum(map(len, drawn)) == len(thread.logprobs or ())
    assert [t.role for t in thread.token_turns if t.weight] == ["assistant"] * 3
    assert again[: len(thread.token_ids)] == thread.token_ids, "the text keeps them, too"
    assert history.total_number_of_turns_generated == 3 and history.get_cumulative_reward() == 1.0


def test_an_environment_that_builds_its_thread_anew_changes_no_token(one_rank: LiveEngine) -> None:
    def anew(world: Scripted, thread: StringThread, turn: int) -> Any:
        if turn == 2:
            return None, grade(1.0)
        return StringThread([*thread.get_turns(), ("tool", "7")]), grade(0.5)

    (thread,), history = play(one_rank, Factory(anew))
    assert len(thread.logprobs or ()) == sum(w > 0 for w in thread.token_weights)
    assert thread.metadata == {"key": 7} and history.get_raw_rewards_for_stats() == [0.5, 1.0]


def test_a_rewritten_conversation_begins_a_new_thread(one_rank: LiveEngine) -> None:
    """An assistant's turn of the environment stands before, and another between: neither is trained."""
    prompt = StringThread([("user", "a"), ("assistant", "shown"), ("user", "b")])

    def react(world: Scripted, thread: StringThread, turn: int) -> Any:
        if turn == 1:
            return StringThread.from_turns(
                [*thread.turns, *StringThread([("assistant", "mine"), ("user", "c")]).turns]
            ), None
        if turn == 2:
            changed = [replace(thread.turns[0], fragments=StringThread([("user", "z")]).turns[0].fragments)]
            return StringThread.from_turns([*changed, *thread.turns[1:]]).user("d"), grade(0.5)
        return None, grade(1.0)

    threads, history = play(one_rank, Factory(react), prompt)
    assert [thread.get_turn_weights() for thread in threads] == [[0, 0, 0, 1, 0, 0, 1], [0] * 8 + [1]]
    assert history.get_grades_per_turn() == [None, grade(0.5), grade(1.0)]
    assert [len(thread.turns) for thread in history.threads] == [2, 1]
    assert all(len(t.logprobs or ()) == sum(w > 0 for w in t.token_weights) for t in threads)


def test_a_tools_response_that_changes_begins_a_new_thread(one_rank: LiveEngine) -> None:
    """As text, both are empty."""

    def react(world: Scripted, thread: StringThread, turn: int) -> Any:
        if turn == 1:
            return thread.tool("1"), None
        kept = StringThread.from_turns(thread.turns[:2]).tool("2")
        return (
            (None, grade(1.0))
            if turn == 3
            else (StringThread.from_turns([*kept.turns, thread.turns[3]]).user("?"), None)
        )

    threads, _ = play(one_rank, Factory(react))
    assert len(threads) == 2


def test_seeds_do_not_depend_on_how_trajectories_mix(one_rank: LiveEngine) -> None:
    async def work(slow: int) -> list[list[int]]:
        async def react(world: Scripted, thread: StringThread, turn: int) -> Any:
            for _ in range(20 * (world.metadata["n"] == slow)):
                await asyncio.sleep(0)
            return answers(3)(world, thread, turn)

        async with policy(one_rank, "seeds") as model:
            model._live.engine.request_numbers.clear()  # type: ignore[attr-defined]
            prompts = [StringThread([("user", "hi")], {"n": n}) for n in range(4)]
            played = await asyncio.gather(*(Factory(react).play(model, prompt) for prompt in prompts))
        return [threads[0].token_ids for threads, _ in played]

    first, second = one_rank.run(work(0)), one_rank.run(work(3))
    assert first == second and len({tuple(ids) for ids in first}) == 4


# --- limits -----------------------------------------------------------------------------------------------------


def test_a_trajectory_ends_at_its_limits(one_rank: LiveEngine) -> None:
    endless = answers(10**9)
    threads, history = play(one_rank, Factory(endless, Limits(turns=3)))
    assert history.truncated == "turns" and history.total_number_of_turns_generated == 3
    assert history.get_raw_rewards_for_stats() == [0.0], "its last turn was not graded"
    threads, history = play(one_rank, Factory(endless), max_batch_size=120)
    assert history.truncated == "tokens" and len(threads[0].token_ids) <= 120
    threads, history = play(one_rank, Factory(endless, Limits(tokens=90)))
    assert history.truncated == "tokens" and 60 < len(threads[0].token_ids) <= 90
    threads, history = play(one_rank, Factory(endless, Limits(seconds=0.0)))
    assert history.truncated == "seconds" and history.total_number_of_turns_generated == 1
    with pytest.raises(PromptTooLong):
        play(one_rank, Factory(endless), StringThread([("user", "x" * 200)]), max_batch_size=120)


def raising(world: Scripted, thread: StringThread, turn: int) -> Any:
    raise KeyError("gone")


async def hanging(world: Scripted, thread: StringThread, turn: int) -> Any:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:  # it ends in its own time
        await asyncio.sleep(0.1)
        raise


async def cancelled(world: Scripted, thread: StringThread, turn: int) -> Any:
    raise asyncio.CancelledError


def leaving(world: Scripted, thread: StringThread, turn: int) -> Any:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("react", "error", "message"),
    [
        (raising, EnvironmentFailed, r"Scripted raised KeyError: 'gone'"),
        (hanging, EnvironmentTimeout, "Scripted took longer than 0.05 s"),
        (cancelled, EnvironmentFailed, "cancelled"),
        (leaving, EnvironmentFailed, r"SystemExit\(3\)"),
        (lambda *_: 5, EnvironmentFailed, "TypeError"),
        (lambda *_: (None, None), EnvironmentFailed, "list of Grade"),
        (lambda *_: ("text", None), EnvironmentFailed, "StringThreads, not str"),
        (lambda *_: (None, [Grade(float("nan"), "k")]), EnvironmentFailed, "finite"),
        (lambda world, thread, turn: (thread.tool("1"), 0.5), EnvironmentFailed, "0.5"),
    ],
)
def test_what_an_environment_does_wrong_concerns_its_trajectory(
    one_rank: LiveEngine, react: Callable[..., Any], error: type[Exception], message: str
) -> None:
    limits = Limits(react_seconds=0.05 if react is hanging else 60.0)
    with pytest.raises(error, match=message):
        play(one_rank, Factory(react, limits))


def test_code_that_refuses_to_be_cancelled_does_not_hold_up_the_end() -> None:
    over = threading.Event()

    async def stubborn() -> None:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def work() -> None:
        with pytest.raises(EnvironmentTimeout):
            await within(0.05, "World", stubborn())

    running = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    running.start()
    running.join(30)
    held_up = running.is_alive()
    over.set()
    running.join()
    assert not held_up


def test_a_plain_react_to_may_block(one_rank: LiveEngine) -> None:
    release = threading.Event()

    class Blocking(Scripted):
        def react_to(self, thread: StringThread) -> Any:  # type: ignore[override]
            release.wait()
            return None, grade(1.0)

    class Makes(Factory):
        def create_environment(self, metadata: Any) -> Scripted:
            return Blocking(self.add_log, self.react, metadata)

    with pytest.raises(EnvironmentTimeout):
        play(one_rank, Makes(raising, Limits(react_seconds=0.05)))
    release.set()
    assert play(one_rank, Makes(raising))[1].get_cumulative_reward() == 1.0


def test_the_documented_call_gives_text_with_weights(one_rank: LiveEngine) -> None:
    def work(model: TrainingModel) -> Coroutine[Any, Any, Any]:
        world = Factory(answers(2)).create_environment(None)
        return world.generate_trajectory_and_grade(model, PROMPT)

    async def run() -> Any:
        async with policy(one_rank) as model:
            return await work(model)

    threads, history = one_rank.run(run())
    assert [thread.get_turn_weights() for thread in threads] == [[0, 1, 0, 1]]
    assert isinstance(threads[0], StringThread) and len(history.threads) == 1
