"""The format of evaluation artifacts as the report reads them: means by model and grader, and a few answers of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony_core.errors import VerificationError
from harmony_core.plain_files import open_plain
from harmony_core.runs.records import lines_of

MAX_BYTES = 64 * 1024 * 1024
"""Bytes that are read of the file of one evaluation."""
MAX_EVALUATIONS = 6
MAX_MODELS = 100


@dataclass
class Evaluation:
    """One evaluation, not yet escaped."""

    name: str
    count: int = 0
    cut: bool = False
    graders: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By model and grader: sum of the values, number of values, number of unscored samples."""
    kept: dict[str, list[tuple[str, str, dict[str, str]]]] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    """Prompt, model, completion, and the grade and reason of each grader."""

    @property
    def means(self) -> list[tuple[str, list[str]]]:
        """Each model with the mean by each grader."""
        means = [(model, [_mean(row.get(g, [0, 0, 0])) for g in self.graders]) for model, row in self.scores.items()]
        return means[:MAX_MODELS]


def read_evaluations(
    directory: Path, artifacts: Sequence[dict[str, Any]], max_rows: int, max_text: int
) -> list[Evaluation]:
    """The last evaluations of a run, at most `max_rows` answers of each, the same prompts for every model.

    A file outside of the run's directory, a missing one and a damaged one are left out.
    """
    found = []
    for entry in [entry for entry in artifacts if entry.get("kind") == "eval" and entry.get("path")][-MAX_EVALUATIONS:]:
        path = directory / str(entry["path"])
        try:
            if path.resolve().is_relative_to(directory.resolve()):
                found.append(_read(Evaluation(str(entry.get("name"))), path, max_rows, max_text))
        except (VerificationError, ValueError, LookupError, TypeError, AttributeError):  # not of the shape of samples
            continue
    return found


def _read(found: Evaluation, path: Path, max_rows: int, max_text: int) -> Evaluation:
    room = MAX_BYTES
    with open_plain(path) as file:
        for line in lines_of(file):
            room -= len(line)
            if room < 0:
                found.cut = True
                break
            _take(found, json.loads(line), max_rows, max_text)
    each = max(max_rows // max(len(found.kept), 1), 1)
    for place in range(each):
        for model, kept in list(found.kept.items())[:max_rows]:
            if place < len(kept):
                prompt, completion, grades = kept[place]
                found.rows.append([prompt, model, completion, *(grades.get(g, "unscored") for g in found.graders)])
    return found


def _take(found: Evaluation, sample: dict[str, Any], max_rows: int, max_text: int) -> None:
    interaction, grades = sample["interaction"]["New"], {}
    model, turns = str(interaction["model_key"]).removeprefix("model_registry://"), interaction["turns"]
    scores = found.scores.setdefault(model, {})
    for grade in sample["grades"]:
        key, value = str(grade["grader_key"]), grade["value"]
        found.graders += [key] if key not in found.graders else []
        scored = isinstance(value, int | float) and math.isfinite(value)
        sums = scores.setdefault(key, [0.0, 0, 0])
        sums[0 if scored else 2] += value if scored else 1
        sums[1] += scored
        told, reason = f"{value:.5g}" if scored else "unscored", grade.get("reasoning")
        grades[key] = f"{told}: {reason}"[:max_text] if reason else told
    found.count += 1
    kept = found.kept.setdefault(model, [])
    if len(kept) < max_rows:
        texts = [f"[{turn['role']}] {_text(turn['content'])}" for turn in turns]
        answered = bool(turns) and turns[-1]["role"] == "assistant"
        prompt = "\n".join(texts[:-1] if answered else texts)
        kept.append((prompt[:max_text], _text(turns[-1]["content"])[:max_text] if answered else "", grades))


def _mean(sums: list[float]) -> str:
    total, count, unscored = sums
    mean = f"{total / count:.4g}" if count else "all failed"
    return mean + (f" ({unscored:.0f} unscored)" if unscored and count else "")


def _text(content: list[dict[str, Any]]) -> str:
    names = ("text", "content", "raw_text", "arguments")
    return "".join(str(next((part[name] for name in names if name in part), "<image>")) for part in content)
