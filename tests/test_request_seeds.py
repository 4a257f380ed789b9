"""Training's requests have the same seeds whether or not something looks at the model in between."""

from __future__ import annotations

import asyncio

from harmony_core.request_seeds import looking, request_seed


def seeds(count: int, numbers: dict[str, int], model: str = "policy") -> list[int]:
    return [request_seed(7, model, numbers) for _ in range(count)]


def test_looks_are_apart_from_training_and_from_each_other() -> None:
    alone = seeds(6, {})
    numbers: dict[str, int] = {}
    found = seeds(2, numbers)
    looks = []
    for label in ("callback 0 at 0.5", "callback 1 at 0.5", "callback 0 at 1.0"):
        with looking(label):
            looks += seeds(3, numbers) + seeds(1, numbers, "judge")
    found += seeds(4, numbers)
    assert found == alone and numbers == {"policy": 6}
    assert len({*looks, *alone}) == len(looks) + len(alone)


def test_a_look_is_the_same_whatever_was_asked_before() -> None:
    with looking("evaluation"):
        first = seeds(3, {})
    with looking("evaluation"):
        assert seeds(1, {"policy": 12}) == first[:1]
        with looking("a part of it"):
            assert seeds(2, {}) == first[1:]


def test_tasks_belong_to_where_they_were_begun() -> None:
    numbers: dict[str, int] = {}

    async def ask() -> int:
        await asyncio.sleep(0)
        return request_seed(7, "policy", numbers)

    async def run() -> tuple[int, int]:
        outside = asyncio.ensure_future(ask())
        with looking("inside"):
            inside = asyncio.ensure_future(ask())
            await outside
        return await outside, await inside

    outside, inside = asyncio.run(run())
    assert outside == seeds(1, {})[0] != inside and numbers == {"policy": 1}
