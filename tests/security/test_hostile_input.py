"""Hostile input of every kind, through the real command: it is taken or refused, and nothing else happens."""

from __future__ import annotations

import pytest

from security.cases import Ask, Record, check, parts
from security.planted import PLANTED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("kind", "numbers", "fresh"), parts("yaml", "jsonl", "keys", "frames", "values", "checkpoints")
)
def test_hostile_input_is_taken_or_refused_and_nothing_else_happens(
    ask: Ask, kind: str, numbers: range, fresh: bool, record_property: Record
) -> None:
    check(ask, kind, numbers, fresh, record_property)


@pytest.mark.parametrize("said", PLANTED)
def test_a_breach_is_seen(ask: Ask, said: str) -> None:
    answer = ask(said, 0, seconds=1, patience=0.2)
    assert any(said in fault for fault in answer["faults"]), answer
