"""Writes the shipped data: sort five different letters, and preferences for the sorted over nearly sorted ones.

No set of letters of a held-out file occurs in a training file, so neither its prompts nor its answers do.

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


def preferences(letters: Iterable[str], seed: int = 0) -> str:
    """One JSON line for each prompt: the sorted letters are preferred to those with two neighbours exchanged."""
    draw, found = random.Random(seed), []
    for text in letters:
        right = sorted(text)
        place = draw.randrange(LETTERS - 1)
        wrong = [*right[:place], right[place + 1], right[place], *right[place + 2 :]]
        pair = {"preferred_completion": "".join(right), "other_completion": "".join(wrong)}
        found.append(json.dumps({"messages": [{"role": "user", "content": text}], **pair}) + "\n")
    return "".join(found)


def main(directory: Path) -> None:
    """Write the files."""
    shuffled = prompts()
    names = {"sort-letters-preferences": shuffled[:TRAINING], "sort-letters-preferences-held-out": shuffled[TRAINING:]}
    for name, chosen in names.items():
        (directory / f"{name}.jsonl").write_text(preferences(chosen), encoding="utf-8")
    (directory / "sort-letters.jsonl").write_text(lines(shuffled[:TRAINING]), encoding="utf-8")
    (directory / "sort-letters-held-out.jsonl").write_text(lines(shuffled[TRAINING:]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
