"""What training code tells a run, as events."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from harmony_core.journal import MAX_SAMPLES, MAX_TEXT, Piece, kept, phase, samples_wanted, tell_dropped, tell_sample
from leftovers import turns

Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def events() -> Events:
    return []


def test_outside_of_a_run_nothing_happens() -> None:
    with phase("training"):
        tell_sample(1, [("user", [Piece("x")])])
        tell_dropped({"sample_too_long": 1})
    assert samples_wanted(1) == 0


def test_tasks_that_share_a_phase_make_one_event(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("harmony_core.journal.time", SimpleNamespace(monotonic=lambda: now))

    async def work(name: str, until: float) -> None:
        nonlocal now
        with phase(name):
            await turns(round(until) - 100)
            now = max(now, until)

    async def main() -> None:
        with kept(lambda type, data: events.append((type, data))):
            await asyncio.gather(work("rollout", 103.0), work("rollout", 106.0), work("grading", 101.0))
            await work("rollout", 107.0)

    asyncio.run(main())
    assert [(type, data["name"]) for type, data in events] == [
        ("phase", "grading"),
        ("phase", "rollout"),
        ("phase", "rollout"),
    ]
    assert [(data["start"], data["seconds"]) for _, data in events] == [(0.0, 1.0), (0.0, 6.0), (6.0, 1.0)]


def test_a_phase_that_fails_is_told_too(events: Events) -> None:
    with kept(lambda type, data: events.append((type, data))), pytest.raises(ValueError), phase("training"):
        raise ValueError
    assert events[0][1]["name"] == "training"


def test_samples(events: Events) -> None:
    with kept(lambda type, data: events.append((type, data))):
        turns = [("user", [Piece("say a")]), ("assistant", [Piece("a", 1.0, -0.123456789), Piece("\n", 1.0)])]
        tell_sample(3, turns, source="rollout", reward=1, advantage=float("nan"), group="p1", grades={"exact": 1.0})
    assert events == [
        (
            "sample",
            {
                "step": 3,
                "source": "rollout",
                "reward": 1.0,
                "advantage": "nan",
                "group": "p1",
                "grades": {"exact": 1.0},
                "turns": [
                    {"role": "user", "pieces": [["say a", 0.0]]},
                    {"role": "assistant", "pieces": [["a", 1.0, -0.123457], ["\n", 1.0]]},
                ],
            },
        )
    ]
    json.dumps(events, allow_nan=False)


def test_a_step_keeps_a_few_samples_of_limited_length(events: Events) -> None:
    with kept(lambda type, data: events.append((type, data))):
        for _ in range(MAX_SAMPLES + 3):
            tell_sample(1, [("user", [Piece("x" * MAX_TEXT), Piece("y" * 10)])])
        assert (samples_wanted(1), samples_wanted(1, "rollout"), samples_wanted(2)) == (0, MAX_SAMPLES, MAX_SAMPLES)
        tell_sample(2, [("user", [Piece("x")])])
    assert [data["step"] for _, data in events] == [1] * MAX_SAMPLES + [2]
    assert events[0][1]["cut"] is True and "cut" not in events[-1][1]
    assert sum(len(text) for text, *_ in events[0][1]["turns"][0]["pieces"]) == MAX_TEXT


def test_dropped_samples(events: Events) -> None:
    with kept(lambda type, data: events.append((type, data))):
        tell_dropped({})
        tell_dropped({"sample_too_long": 2}, last="the sample has 9 tokens", taken=10)
    data = {"reasons": {"sample_too_long": 2}, "taken": 10, "last": "the sample has 9 tokens"}
    assert events == [("samples.dropped", data)]
