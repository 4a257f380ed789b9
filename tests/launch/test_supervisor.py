"""The supervisor over ranks without torch: calls, failures of every kind, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from harmony_core.errors import (
    EngineError,
    HarmonyError,
    LauncherDied,
    RankDied,
    RankError,
    ResourceError,
    RunTimeout,
    SampleTooLong,
)
from harmony_core.launch.launcher import Launch
from harmony_core.launch.supervisor import RankHandle, Supervisor
from harmony_core.options import EngineOptions
from harmony_core.rpc.protocol import Cancel, Dealloc, Event, Message, Nothing, Score, Scored
from leftovers import running, turns, until, wait_until

TESTS = Path(__file__).parents[1]
LAUNCHER = [sys.executable, "-P", str(TESTS / "fake_launcher.py")]
RANK = [sys.executable, "-P", str(TESTS / "fake_rank.py")]


async def ask(rank: RankHandle, message: Message) -> Message:
    return await rank.connection.submit(message)[1]


class Run:
    """One supervisor with fake ranks."""

    def __init__(self, supervisor: Supervisor, events: list[tuple[int, Event]], options: EngineOptions) -> None:
        self.supervisor = supervisor
        self.events = events
        self.options = options
        self.gate = options.log_dir.with_suffix(".gate")
        """A file that late ranks wait for."""

    async def do(self, rank: int, what: str) -> Any:
        ranks = await self.supervisor.ready()
        return await ask(ranks[rank], Dealloc(model=what))

    async def failure(self) -> HarmonyError:
        return await asyncio.wait_for(asyncio.shield(self.supervisor.failure), 30)

    async def busy(self, rank: int, what: str) -> asyncio.Task[Any]:
        """Begin to `do` it, and wait until the rank is at it."""
        ranks = await self.supervisor.ready()
        call = asyncio.create_task(self.do(rank, what))
        await until(lambda: ranks[rank].phase == "forward")
        return call

    def processes(self) -> list[int]:
        return running("ADAPTIVE_RUN_ID", self.options.run_id)


_count = 0


@asynccontextmanager
async def started(tmp_path: Path, ranks: int = 2, spoil: str = "", **options: Any) -> AsyncIterator[Run]:
    """A supervisor that is stopped at the end; then nothing of it may be left."""
    global _count
    _count += 1
    run_id = f"{os.getpid()}-{_count}"
    launch = EngineOptions(
        log_dir=tmp_path / f"logs-{_count}",
        run_id=run_id,
        command=RANK,
        launcher=LAUNCHER,
        **options,
    )
    events: list[tuple[int, Event]] = []
    told = {"ADAPTIVE_FAKE": spoil, "ADAPTIVE_FAKE_GATE": str(tmp_path / f"logs-{_count}.gate")}
    with patch.dict(os.environ, told):
        supervisor = await Supervisor.start(
            launch, Launch("cpu", ranks), lambda rank, event: events.append((rank, event))
        )
    run = Run(supervisor, events, launch)
    try:
        yield run
    finally:
        await asyncio.wait_for(supervisor.stop(2), 30)
        assert run.processes() == []


async def test_calls_reach_their_rank_and_stop_leaves_nothing(tmp_path: Path, no_leftovers: Path):
    async with started(tmp_path) as run:
        assert run.supervisor.world_size == 2
        ranks = await run.supervisor.ready()
        assert [r.rank for r in ranks] == [0, 1] and len({r.pid for r in ranks}) == 2
        assert list(no_leftovers.iterdir()) == []  # nothing on disk once all are connected
        answer = await ask(ranks[1], Score(model="m", replica=0, tokens=b"", targets=b"abc"))
        assert answer == Scored(logprobs=b"abc")
        assert sorted(rank for rank, event in run.events if event.type == "rank_ready") == [0, 1]
        assert not run.supervisor.failure.done()
    assert not run.supervisor.failure.done()
    assert (run.options.log_dir / "launcher.log").read_text() == ""
    assert (run.options.log_dir / "rank-1.log").stat().st_mode & 0o777 == 0o600


async def test_submit_gives_the_id_that_cancel_names(tmp_path: Path):
    async with started(tmp_path, ranks=1) as run:
        [rank] = await run.supervisor.ready()
        first, _ = rank.connection.submit(Dealloc(model="ok"))
        second, answer = rank.connection.submit(Dealloc(model="ok"))
        assert second == first + 1
        rank.connection.cast(Cancel(call=second))
        assert await answer == Nothing()
        await ask(rank, Dealloc(model="ok"))
        assert [e.data for _, e in run.events if e.type == "cancelled"] == [{"call": second, "id": 0}]


async def test_a_burst_of_calls_is_answered_in_full_and_in_order(tmp_path: Path):
    async with started(tmp_path, ranks=1) as run:
        [rank] = await run.supervisor.ready()
        done: list[int] = []

        async def one(index: int) -> None:
            payload = index.to_bytes(4, "little") * 256
            assert await ask(rank, Score(model="m", replica=0, tokens=b"", targets=payload)) == Scored(logprobs=payload)
            done.append(index)

        async with asyncio.timeout(60):
            await asyncio.gather(*(one(index) for index in range(1000)))
            await asyncio.gather(*(one(index) for index in range(1000, 9000)))  # more than may be in flight
        assert done == list(range(9000))


async def test_two_hundred_cancelled_calls_do_not_confuse_later_ones(tmp_path: Path):
    rng = random.Random(3)
    async with started(tmp_path, ranks=1) as run:
        [rank] = await run.supervisor.ready()
        for index in range(200):
            late = asyncio.create_task(ask(rank, Dealloc(model=rng.choice(["ok", "sleep:0.002"]))))
            await turns(rng.randrange(30))
            late.cancel()
            payload = str(index).encode()
            assert await ask(rank, Score(model="m", replica=0, tokens=b"", targets=payload)) == Scored(logprobs=payload)


async def test_errors_of_a_call_are_typed_and_leave_the_engine_up(tmp_path: Path):
    async with started(tmp_path) as run:
        with pytest.raises(SampleTooLong) as long:
            await run.do(0, "typed")
        assert long.value.details["tokens"] == 12 and "max_batch_size" in long.value.hint
        with pytest.raises(RankError, match="rank 1: ValueError: boom") as error:
            await run.do(1, "raise")
        assert error.value.details["type"] == "ValueError" and "fake_rank.py" in error.value.details["traceback"]
        assert await run.do(1, "ok") == Nothing()
        assert not run.supervisor.failure.done()


DEATHS = [
    ("signal:SIGKILL", "SIGKILL", "forward"),
    ("signal:SIGABRT", "SIGABRT", "forward"),
    ("exit:3", "status 3", None),
    ("exit:0", "status 0", None),
]


@pytest.mark.parametrize(("what", "cause", "phase"), DEATHS)
async def test_a_dead_rank_is_named_with_cause_phase_and_log(tmp_path: Path, what: str, cause: str, phase: str | None):
    async with started(tmp_path) as run:
        pending = asyncio.create_task(run.do(0, "sleep:60"))
        with pytest.raises(RankDied, match=cause) as death:
            await run.do(1, what)
        details = death.value.details
        assert details["rank"] == 1 and cause in details["cause"] and 1 <= len(details["log"]) <= 50
        assert phase in (None, details["phase"])
        assert await run.failure() is death.value
        with pytest.raises(RankDied):
            await pending
        with pytest.raises(RankDied):
            await run.do(0, "ok")
        assert await asyncio.to_thread(wait_until, lambda: not run.processes(), 5)


async def test_a_rank_that_raises_is_reported_with_its_own_words(tmp_path: Path):
    async with started(tmp_path) as run:
        with pytest.raises(RankError, match="rank 1: ValueError: boom") as error:
            await run.do(1, "fatal")
        assert error.value.details["rank"] == 1 and any("ValueError" in line for line in error.value.details["log"])


@pytest.mark.parametrize("echo", ["gloo", "gloo-fatal"])
async def test_the_echo_of_a_death_gives_way_to_the_death(tmp_path: Path, echo: str):
    """Rank 0 complains about its peer before the peer's own end is seen: rank 1 is named all the same."""
    async with started(tmp_path) as run:
        ranks = await run.supervisor.ready()
        complaint = asyncio.create_task(run.do(0, echo))
        await turns(2)
        if echo == "gloo":  # it is heard when the next call is answered
            await ask(ranks[0], Score(model="m", replica=0, tokens=b"", targets=b""))
            assert not complaint.done()
        with pytest.raises(RankDied, match="rank 1") as death:
            await run.do(1, "exit:9")
        with pytest.raises(RankDied) as same:
            await complaint
        assert same.value is death.value


async def test_an_echo_without_a_death_is_told_in_the_end(tmp_path: Path):
    async with started(tmp_path) as run:
        with pytest.raises(RankError, match="Connection closed by peer"):
            await run.do(0, "gloo")
        assert not run.supervisor.failure.done()


async def test_a_killed_launcher_is_what_is_reported(tmp_path: Path):
    async with started(tmp_path) as run:
        await run.supervisor.ready()
        os.kill(run.supervisor._processes.launcher_pid, 9)
        failure = await run.failure()
        assert isinstance(failure, LauncherDied) and "SIGKILL" in failure.message
        assert await asyncio.to_thread(wait_until, lambda: not run.processes(), 5)


async def test_garbage_from_a_rank_fails_the_engine_and_names_it(tmp_path: Path):
    async with started(tmp_path) as run:
        with pytest.raises(RankError, match=r"rank 1 .*announces"):
            await run.do(1, "garble")


async def test_garbage_from_the_driver_ends_the_rank_with_the_reason(tmp_path: Path):
    async with started(tmp_path) as run:
        ranks = await run.supervisor.ready()
        transport = ranks[1].connection._transport
        assert transport is not None
        transport.write(b"\xff" * 64)
        failure = await run.failure()
        assert isinstance(failure, RankError) and "rank 1" in failure.message and "announces" in failure.message


async def test_children_of_a_rank_are_ended_too(tmp_path: Path):
    async with started(tmp_path) as run:
        await run.do(1, "child")
        assert await asyncio.to_thread(wait_until, lambda: len(run.processes()) == 4, 5)
        with pytest.raises(RankDied):
            await run.do(1, "exit:1")
        assert await asyncio.to_thread(wait_until, lambda: not run.processes(), 5)


# --- start-up -----------------------------------------------------------------------------------------------------


async def test_an_exception_at_start_is_told_verbatim_at_once(tmp_path: Path):
    async with started(tmp_path, spoil="1:raise") as run, asyncio.timeout(30):
        with pytest.raises(RankError, match="rank 1: ModuleNotFoundError: No module named 'no_such_thing'"):
            await run.supervisor.ready()


async def test_a_rank_that_leaves_before_it_connects_is_named(tmp_path: Path):
    async with started(tmp_path, spoil="1:exit") as run:
        with pytest.raises(RankDied, match=r"rank 1 .* before it reached the driver: exited with status 5"):
            await run.supervisor.ready()


@pytest.mark.parametrize("spoil", ["1:unready", "1:mute"])
async def test_a_rank_that_does_not_get_ready_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    monkeypatch.setattr("harmony_core.launch.supervisor.INIT_TIMEOUT", 2.5)
    async with started(tmp_path, spoil=spoil) as run:
        told = r"within 2.5 s: rank 1 \(pid \d+\) is stuck in phase '(rendezvous|starting)'"
        with pytest.raises(RunTimeout, match=told):
            await run.supervisor.ready()


async def test_a_late_rank_is_waited_for(tmp_path: Path):
    async with started(tmp_path, spoil="1:late") as run:
        await until(lambda: [h.ready for h in run.supervisor._handles.values()] == [True])
        run.gate.touch()
        assert len(await run.supervisor.ready()) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("1:version", "9.9.9"),
        ("1:protocol", "protocol 99"),
        ("1:world", "one of 7"),
        ("1:rank", "rank 0"),
        ("1:pid", "process 1"),
        ("1:torch", "torch"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused(tmp_path: Path, spoil: str, words: str):
    async with started(tmp_path, spoil=spoil) as run:
        with pytest.raises(ResourceError, match=words):
            await run.supervisor.ready()


async def test_a_wrong_token_gets_nowhere(tmp_path: Path):
    async with started(tmp_path, spoil="1:token") as run:
        with pytest.raises(EngineError):
            await run.supervisor.ready()
        assert list(run.supervisor._handles) in ([0], [])


async def test_a_launcher_that_cannot_start_is_shown(tmp_path: Path):
    options = EngineOptions(log_dir=tmp_path, run_id="x", launcher=[sys.executable, "-c", "1/0"])
    supervisor = await Supervisor.start(options, Launch("cpu", 1), lambda rank, event: None)
    try:
        with pytest.raises(LauncherDied, match="ZeroDivisionError"):
            await supervisor.ready()
    finally:
        await supervisor.stop()


async def test_start_does_not_hold_the_loop_up(tmp_path: Path):
    async with started(tmp_path, spoil="*:late") as run:

        async def elsewhere() -> None:
            await until(lambda: len(run.processes()) == 3)
            run.gate.touch()  # the ranks wait for what only the loop can do

        await asyncio.gather(run.supervisor.ready(), elsewhere())


# --- stuck, not dead ----------------------------------------------------------------------------------------------


async def test_a_stopped_rank_is_stuck_and_named(tmp_path: Path):
    async with started(tmp_path, hang_timeout=2.5) as run:
        with pytest.raises(RunTimeout, match=r"rank 1 .* is stuck .*SIGSTOP") as stuck:
            await asyncio.wait_for(run.do(1, "signal:SIGSTOP"), 30)
        assert stuck.value.details["rank"] == 1


async def test_a_hanging_rank_writes_its_stack_and_is_named(tmp_path: Path):
    async with started(tmp_path, hang_timeout=2) as run:
        with pytest.raises(RunTimeout, match=r"rank 1 .* is stuck in phase 'forward'") as stuck:
            await asyncio.wait_for(run.do(1, "sleep:60"), 30)
        assert any("in act" in line for line in stuck.value.details["log"])
        assert "most recent call first" in (run.options.log_dir / "rank-0.log").read_text()


async def test_a_driver_that_blocks_its_own_loop_accuses_nobody(tmp_path: Path):
    async with started(tmp_path, hang_timeout=2, silence_timeout=2) as run:
        await run.supervisor.ready()
        time.sleep(4)
        watch, looks = run.supervisor._watch, 0

        def stuck() -> list[RankHandle]:
            nonlocal looks
            looks += 1
            return type(watch).stuck(watch)

        watch.stuck = stuck  # type: ignore[method-assign]
        await until(lambda: looks > 2)
        assert await run.do(1, "ok") == Nothing()
        assert not run.supervisor.failure.done()


async def test_a_busy_rank_and_an_idle_one_are_left_alone(tmp_path: Path):
    async with started(tmp_path, silence_timeout=2.5) as run:
        assert await run.do(1, "hog:4") == Nothing()
        assert not run.supervisor.failure.done()


# --- stop ---------------------------------------------------------------------------------------------------------


async def test_stop_does_not_wait_for_a_rank_that_is_busy_for_longer_than_the_grace(tmp_path: Path):
    async with started(tmp_path) as run:
        call = await run.busy(1, "sleep:600")
        await asyncio.wait_for(run.supervisor.stop(0.5), 30)
        with pytest.raises(EngineError, match="stopped"):
            await call


async def test_a_second_stop_hurries_the_first(tmp_path: Path):
    async with started(tmp_path) as run:
        call = await run.busy(1, "sleep:600")
        first = asyncio.create_task(run.supervisor.stop(600))
        await until(lambda: run.supervisor._handles[0].lost)
        async with asyncio.timeout(30):
            await run.supervisor.stop(0)
            await first
        await asyncio.gather(call, return_exceptions=True)


async def test_stop_in_the_middle_of_the_start(tmp_path: Path):
    for processes, connected in ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1)):
        async with started(tmp_path, spoil="1:late" if connected else "*:late") as run:
            waiting = asyncio.create_task(run.supervisor.ready())
            moment = processes, connected
            await until(lambda run=run, at=moment: (len(run.processes()), len(run.supervisor._handles)) >= at)
        with pytest.raises(EngineError, match="stopped"):
            await waiting


async def test_many_launches_leave_no_descriptor_and_no_thread(tmp_path: Path):
    async def once() -> None:
        async with started(tmp_path, ranks=1) as run:
            await run.do(0, "ok")

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        await once()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_two_launches_side_by_side(tmp_path: Path):
    async with started(tmp_path) as one, started(tmp_path) as two:
        ranks = await one.supervisor.ready() + await two.supervisor.ready()
        assert len({rank.pid for rank in ranks}) == 4
        with pytest.raises(RankDied):
            await one.do(0, "exit:1")
        assert await two.do(1, "ok") == Nothing()


async def kills(tmp_path: Path, count: int, choose: Callable[[random.Random], str]) -> list[float]:
    """Deaths at random ranks and moments: how long each took to surface, every one named rightly."""
    rng, delays = random.Random(11), []
    for _ in range(count):
        async with started(tmp_path) as run:
            ranks = await run.supervisor.ready()
            victim = rng.randrange(2)
            work = [asyncio.create_task(ask(rank, Dealloc(model=choose(rng)))) for rank in ranks]
            await turns(rng.randrange(300))
            before = time.monotonic()
            os.kill(ranks[victim].pid, 9)
            failure = await run.failure()
            delays.append(time.monotonic() - before)
            assert isinstance(failure, RankDied) and failure.details["rank"] == victim, failure
            assert "SIGKILL" in failure.details["cause"]
            await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 30)
    return delays


async def test_kills_at_random_moments(tmp_path: Path):
    await kills(tmp_path, 8, lambda rng: rng.choice(["ok", "sleep:30", "hog:0.2"]))


@pytest.mark.slow
async def test_fifty_kills_at_random_moments(tmp_path: Path):
    delays = sorted(await kills(tmp_path, 50, lambda rng: rng.choice(["ok", "sleep:30", "hog:0.2"])))
    assert delays[-1] < 5 and delays[25] < 0.5


async def test_a_run_whose_reader_died_ends(tmp_path: Path) -> None:
    async with started(tmp_path) as run:
        await run.supervisor.ready()
        reader = run.supervisor._processes._reader
        assert reader is not None
        reader.kill()
        assert "keeps the ranks' output" in str(await run.failure())


async def test_logs_that_cannot_be_written_are_an_error_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    options = EngineOptions(log_dir=tmp_path / "logs", run_id="x")
    with pytest.raises(ResourceError, match=f"cannot keep the output of the ranks in {tmp_path}/logs"):
        await Supervisor.start(options, Launch("cpu", 1), lambda rank, event: None)
