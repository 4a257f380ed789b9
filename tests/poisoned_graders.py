"""Graders of a file that misbehave as the answer, or chance, says."""

from __future__ import annotations

import json
import os
import random
import re

from harmony_core.errors import IgnoreGradeException
from harmony_core.text.threads import StringThread


def by_answer(thread: StringThread) -> float:
    """Do what the last turn says."""
    answer = thread.last_content()
    if answer == "raise":
        raise KeyError("x")
    if answer == "hang":
        re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock: no thread could end it
    if answer == "die":
        os._exit(3)
    if answer == "ignore":
        raise IgnoreGradeException("not this one")
    if answer == "text":
        return "0.5"  # type: ignore[return-value]
    if answer == "none":
        return None  # type: ignore[return-value]
    if answer == "environment":
        return float("MY_TOKEN" in os.environ)
    if answer == "print":
        print(json.dumps({"value": 7}))
    return float("nan") if answer == "nan" else float(len(answer))


def by_chance(thread: StringThread) -> float:
    """The share of digits; in 30 % of calls, whatever the answer, one of the ways in which a grader fails."""
    way = random.random()
    if way < 0.3:
        bad = ("raise", "die", "nan", "text", "ignore", "hang")[int(way * 20)]
        return by_answer(StringThread([("assistant", bad)]))
    return sum(letter.isdigit() for letter in thread.completion() or "") / 8
