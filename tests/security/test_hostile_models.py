"""Hostile files of a model, as `test_hostile_input` tries the rest. A file of its own, so that both run at once."""

from __future__ import annotations

import pytest

from security.cases import Ask, Record, check, parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(("kind", "numbers", "fresh"), parts("models", "tokenizers", "templates", "gguf"))
def test_a_hostile_model_is_taken_or_refused_and_nothing_else_happens(
    ask: Ask, kind: str, numbers: range, fresh: bool, record_property: Record
) -> None:
    check(ask, kind, numbers, fresh, record_property)
