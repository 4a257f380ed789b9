"""Reward modelling without an engine: which call a sample becomes, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engines import pair
from fake_policy import FakeModel
from harmony_core.algorithms import RewardModelling
from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, UsageError
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread


def rated(text: str, metadata: Any) -> StringThread:
    return StringThread([("user", "q"), ("assistant", text)], metadata)


def run(dataset: list[Any], **options: Any) -> tuple[FakeModel, list[dict[str, Any]]]:
    model = FakeModel(scalar=True)
    metrics: list[dict[str, Any]] = []
    logger = EventLogger(lambda type, data: metrics.append(data["metrics"]) if type == "metrics" else None)
    asyncio.run(RewardModelling(dataset, model.as_model(), logger, **options).run())
    return model, metrics


def test_pairs_are_ranked_in_the_order_of_the_dataset() -> None:
    pairs = [(pair("q", f"good{i}"), pair("q", f"bad{i}")) for i in range(10)]
    model, metrics = run(pairs, samples_per_batch=4)
    assert model.trained == [(good.last_content(), (bad.last_content(),)) for good, bad in DataSet(pairs)]
    assert [size for size, _ in model.steps] == [4, 4, 2]
    assert metrics[-1]["completion_percentage"] == 1.0 and "loss" in metrics[-1]


def test_threads_are_trained_towards_their_rating() -> None:
    model, _ = run([rated(f"t{i}", {"res": i / 2}) for i in range(4)], epochs=2)
    assert sorted(model.trained) == sorted([(f"t{i}", (i / 2,)) for i in range(4)] * 2)


@pytest.mark.parametrize("metadata", [None, {}, {"res": None}, {"res": "0.5"}, {"res": True}])
def test_a_thread_without_a_number_is_refused(metadata: Any) -> None:
    with pytest.raises(DataError, match=r'thread 1 has no number in metadata\["res"\]'):
        run([rated("a", {"res": 1}), rated("b", metadata)])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="mixes 1 threads and 1 pairs"):
        run([rated("a", {"res": 1}), (pair("q", "a"), pair("q", "b"))])
    with pytest.raises(UsageError, match="into_scoring_model"):
        RewardModelling([rated("a", {"res": 1})], FakeModel(scalar=False).as_model())
