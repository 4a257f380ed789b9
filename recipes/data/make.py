"""Writes the data of the quickstart: sort five different letters.

No set of letters of the held-out file occurs in the training file, so neither its prompts nor its answers do.

    python recipes/data/make.py [DIRECTORY]
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Iterable
from pathlib import Path

LETTERS = 5
TRAINING = 3000
HELD_OUT = 200


def prompts(seed: int = 0) -> list[str]:
    """`TRAINING + HELD_OUT` rows of letters, no two of which have the same letters."""
    draw = random.Random(seed)
    found: dict[frozenset[str], str] = {}
    while len(found) < TRAINING + HELD_OUT:
        letters = "".join(draw.sample(string.ascii_lowercase, LETTERS))
        found.setdefault(frozenset(letters), letters)
    return list(found.values())


def lines(letters: Iterable[str]) -> str:
    """One JSON line for each prompt, with its answer."""
    return "".join(
        json.dumps({"messages": [{"role": "user", "content": text}], "completion": "".join(sorted(text))}) + "\n"
        for text in letters
    )


def main(directory: Path) -> None:
    """Write both files."""
    drawn = prompts()
    (directory / "sort-letters.jsonl").write_text(lines(drawn[:TRAINING]), encoding="utf-8")
    (directory / "sort-letters-held-out.jsonl").write_text(lines(drawn[TRAINING:]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
