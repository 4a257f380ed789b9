from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from harmony_core.errors import PromptTooLong, SampleTooLong, TokenizationError
from harmony_core.text import row_lengths
from harmony_core.text.row_lengths import Drops, Lengths, Rows


@pytest.mark.parametrize("seed", range(20))
def test_quantiles_are_those_of_all_rows_though_only_the_long_ones_are_known(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(1, 200) for _ in range(rng.choice((1, 2, 9, 100, 333)))]
    limit, all_known, drops = 64, Lengths(64, "max_batch_size"), Drops()
    for length in tokens:
        drops.note(SampleTooLong("", tokens=length, limit=limit) if length > limit else None)
    all_known.rows, all_known.known = len(tokens), Counter(tokens)
    for part in (0.5, 0.9, 0.99, 1.0):
        right = sorted(tokens)[max(math.ceil(part * len(tokens)), 1) - 1]
        assert all_known.quantile(part) == right
        assert drops.quantile(part) == (right if right > limit else None)
    assert all_known.too_long == drops.too_long == sum(length > limit for length in tokens)
    enough = all_known.enough()
    assert enough == drops.enough()
    kept = sum(length <= (enough or limit) for length in tokens)
    assert kept >= 0.99 * len(tokens)
    assert enough is None or sum(length < enough for length in tokens) < 0.99 * len(tokens), (
        "and not more than it takes"
    )


def test_a_prompt_needs_room_for_an_answer_and_a_context_is_no_setting() -> None:
    drops = Drops()
    drops.note(PromptTooLong("", tokens=80, limit=64, needed=81, setting="max_batch_size", context=512))
    assert drops.enough() == 81 and "max_batch_size=64" in drops.describe()
    drops.note(PromptTooLong("", tokens=600, limit=64, needed=601, setting="max_batch_size", context=512))
    assert drops.enough() is None, "the context does not allow it"
    fixed = Drops()
    fixed.note(SampleTooLong("", tokens=600, limit=512, needed=600, setting="", context=512))
    assert "would keep" not in fixed.describe() and "a limit of 512 tokens" in fixed.describe()
    bare = Drops()
    bare.note(SampleTooLong("raised by hand"))
    assert bare.too_long == 1 and bare.describe()


def measured(row: int) -> list[int]:
    if row < 0:
        raise TokenizationError("no")
    return [row]


def test_rows_are_counted_by_what_will_become_of_them() -> None:
    rows = Rows("SFT", [10, 20, 30, 80, -1], measured, Lengths(64, "max_batch_size", context=512))
    found = rows.count()
    assert {name: found[name] for name in ("rows", "counted", "too_long", "estimate")} == {
        "rows": 5,
        "counted": 5,
        "too_long": 1,
        "estimate": False,
    }
    assert found["tokens"] == {"50 %": 20, "90 %": 80, "99 %": 80, "longest": 80}
    assert found["keeps_99_percent"] == 80 and found["refused"] == {"tokenization_error": 1}
    assert "1 of 4 rows (25 %) are too long for max_batch_size=64" in found["text"]
    assert "1 refused: tokenization_error" in found["text"]
    assert "of the first 5, 1 refused (row 5): no" in found["text"] and found["first"]["refused"] == {"no": [5]}


def test_what_takes_too_long_is_estimated_from_the_same_rows_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lengths, "SAMPLE", 100)
    rows = Rows("SFT", list(range(1000)), measured, Lengths(499, "max_batch_size"))
    estimates = [rows.count(seconds=0) for _ in range(2)]
    assert estimates[0] == estimates[1]
    assert estimates[0]["estimate"] and estimates[0]["counted"] == 100 and 25 < estimates[0]["too_long"] < 75
    assert "100 random rows (an estimate for all 1000)" in estimates[0]["text"]
    whole = rows.count(seconds=1e9)
    assert not whole["estimate"] and whole["too_long"] == 500
    assert rows.count(stopped=lambda: True)["counted"] == 0
