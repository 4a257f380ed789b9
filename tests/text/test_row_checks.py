"""What becomes of rows, and the histogram of their lengths."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from harmony_core.errors import NothingToTrain, TokenizationError
from harmony_core.text.row_lengths import Checked, histogram


def parts(row: int) -> list[int]:
    if row < 0:
        raise TokenizationError("no", hint="another template") if row < -1 else NothingToTrain("no weight")
    return [row] if row < 100 else [row, row // 2]


def test_rows_are_counted_by_what_becomes_of_them() -> None:
    checked = Checked.of([10, -2, 100, -1, -2, 40, *[-2] * 9], parts)
    assert (checked.rows, checked.lengths, checked.split, checked.growth) == (15, [10, 100, 40], 1, 200 / 150)
    assert checked.refused["no; hint: another template"] == [2, 5, *range(7, 16)] and checked.refused["no weight"] == [
        4
    ]
    assert checked.describe() == [
        "1 trained in parts: 1.33 times the tokens",
        "11 refused (row 2, 5, 7, 8, 9, ...): no; hint: another template",
        "1 refused (row 4): no weight",
    ]
    assert Checked.of([1, 2], parts).describe() == []


def test_many_reasons_are_summed_up() -> None:
    def refuse(row: int) -> list[int]:
        raise TokenizationError(f"leaves out {min(row, 20)}")

    lines = Checked.of(range(30), refuse).describe()
    assert len(lines) == 11 and lines[-1] == "11 refused for 11 other reasons"
    assert lines[0] == "10 refused (row 21, 22, 23, 24, 25, ...): leaves out 20"


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_bin_and_the_limit_ends_one(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice((3, 50, 5000))) for _ in range(rng.randrange(0, 60))]
    limit = rng.choice((2, 30, 4096))
    bins = histogram(lengths, limit)
    assert sum(count for *_, count in bins) == len(lengths) and len(bins) <= 52
    assert all(high + 1 == low for (_, high, _), (low, _, _) in pairwise(bins))
    over = sum(count for low, _, count in bins if low > limit)
    assert over == sum(length > limit for length in lengths)
