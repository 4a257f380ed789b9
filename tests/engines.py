"""Real engines for tests: real launcher, real ranks, one event loop that runs while a test waits for something."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from harmony_core.client import EngineOptions, HarmonyClient
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread
from leftovers import until

T = TypeVar("T")
DEADLINE = 180.0


@dataclass
class LiveEngine:
    """A started client. `run` drives the loop; models that a test leaves are freed by `fresh`."""

    loop: asyncio.AbstractEventLoop
    client: HarmonyClient
    registry: Registry
    log_dir: Path
    events: list[tuple[str, dict[str, Any], int | None]] = field(default_factory=list)

    def run(self, work: Coroutine[Any, Any, T], timeout: float = DEADLINE) -> T:
        """Run a coroutine to its end, or fail at the deadline."""
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout))

    def seen(self, type: str, since: int = 0, **match: Any) -> list[tuple[dict[str, Any], int | None]]:
        """Events of one type, with their rank."""
        return [
            (data, rank)
            for kind, data, rank in self.events[since:]
            if kind == type and all(data.get(k) == v for k, v in match.items())
        ]

    async def until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Wait for a condition, with a deadline."""
        await until(condition, timeout)


def start_engine(home: Path, ranks: int, **options: Any) -> LiveEngine:
    """An engine with its home in `home`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.setdefault("device", "cpu")
    loop = asyncio.new_event_loop()
    registry = Registry(Home.open(home))
    log_dir = home / "logs"
    events: list[tuple[str, dict[str, Any], int | None]] = []

    async def start() -> HarmonyClient:
        settings = EngineOptions(log_dir=log_dir, run_id=f"test-{ranks}", num_processes=ranks, **options)
        return HarmonyClient.start(settings, registry, lambda kind, data, rank: events.append((kind, data, rank)))

    return LiveEngine(loop, loop.run_until_complete(start()), registry, log_dir, events)


def stop_engine(engine: LiveEngine) -> None:
    """Stop the ranks and the loop."""
    engine.run(engine.client.aclose())
    engine.loop.close()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    """An engine with one rank, shared by the whole session."""
    engine = start_engine(tmp_path_factory.mktemp("one-rank"), 1)
    yield engine
    stop_engine(engine)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    """An engine with two ranks, shared by the whole session."""
    engine = start_engine(tmp_path_factory.mktemp("two-ranks"), 2)
    yield engine
    stop_engine(engine)


def pair(question: str, answer: str) -> StringThread:
    """A sample: a question and the weighted answer."""
    return StringThread([("user", question), ("assistant", answer)])


def pairs(count: int, letters: int = 4) -> list[StringThread]:
    """Short samples of varying length, always the same."""
    return [pair(f"say {i}", "ab"[i % 2] * (1 + i % letters) + str(i)) for i in range(count)]
