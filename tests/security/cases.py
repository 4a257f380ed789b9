"""How much of each kind of hostile input is tried, and what must be true of it.

`ADAPTIVE_TEST_SECURITY` is how much: a number for each kind, `full` for the numbers of docs/security.md, or unset.
`ADAPTIVE_TEST_SEED` chooses another set; one number gives the same input everywhere.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

SIZES = {
    "yaml": (300, 10_000, 200),
    "jsonl": (300, 2000, 100),
    "models": (300, 500, 50),
    "tokenizers": (30, 200, 50),
    "templates": (300, 3000, 100),
    "gguf": (20, 500, 50),
    "keys": (300, 500, 100),
    "frames": (10, 100, 10),
    "values": (300, 500, 100),
    "checkpoints": (300, 300, 100),
}
"""Cases of each kind: in CI, at full size, and at most in one test. One of frames is a thousand of them."""
ASKED, SEED = os.environ.get("ADAPTIVE_TEST_SECURITY", ""), int(os.environ.get("ADAPTIVE_TEST_SEED", "1"))
FRESH = min(20, int(ASKED)) if ASKED.isdecimal() else 20
"""Cases of each kind in a Python of their own."""

Ask = Callable[..., dict[str, Any]]
Record = Callable[[str, object], None]


def parts(*kinds: str) -> list[Any]:
    """For each kind, the numbers of its cases, as many as one test tries, and those that get a Python of their own."""
    found = []
    for kind in kinds:
        short, full, most = SIZES[kind]
        count = int(ASKED) if ASKED.isdecimal() else full if ASKED == "full" else short
        for first in range(0, count, most):
            numbers = range(first, min(first + most, count))
            found.append(pytest.param(kind, numbers, False, id=f"{kind}-{first}"))
        if kind != "frames":
            found.append(pytest.param(kind, range(FRESH), True, id=f"{kind}-fresh"))
    return found


def check(ask: Ask, kind: str, numbers: range, fresh: bool, record_property: Record) -> None:
    """Nothing is wrong with any of these cases; what was tried is told for the table of docs/security.md."""
    start = time.monotonic()
    answers = {number: ask(kind, number, fresh=fresh) for number in numbers}
    wrong = sum(bool(answer["faults"]) for answer in answers.values())
    codes = Counter(answer["code"] for answer in answers.values())
    named = "each in its own Python" if fresh else kind
    record_property("tried", [named, len(answers), codes[0], wrong, time.monotonic() - start])
    assert not wrong, told(kind, answers)
    # Neither noise that no command looks at, nor input that is merely good.
    assert len(numbers) < 50 or (codes[0] and (len(codes) > 1 or kind == "frames")), codes


def told(kind: str, answers: dict[int, dict[str, Any]]) -> str:
    """Of the cases in which something is wrong: which, what, and what the command said."""
    wrong = {number: answer for number, answer in answers.items() if answer["faults"]}
    lines = [f"{len(wrong)} of {len(answers)} cases of {kind} with seed {SEED}"]
    for number, answer in list(wrong.items())[:10]:
        lines.append(f"--- {number}: {'; '.join(answer['faults'])}\n{answer['words'][:300]}\n{answer['output']}")
    return "\n".join(lines)
