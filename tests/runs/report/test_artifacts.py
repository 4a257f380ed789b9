"""Artifacts in a run's report: listed, with the tables of evaluations."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_runs
from harmony_core.graders import Grade
from harmony_core.graders.evaluation import EvalSample, EvalSampleInteraction, evaluation_tables
from harmony_core.home import Home
from harmony_core.runs.report.page import LIMITS, build_report
from harmony_core.runs.run import Run
from harmony_core.text.threads import StringThread

HOSTILE = report_runs.HOSTILE


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run.create(Home.open(tmp_path / "home"), "evaluate")
    yield made
    made.finish("succeeded", 0, {}, report=False)


def add(run: Run, **fields: Any) -> None:
    entry = {"id": "1", "name": HOSTILE, "kind": "eval", "path": "rows.jsonl", "bytes": 2048, "metadata": {}}
    run.events.write("artifact", entry | fields)


def answers(model: str, count: int, value: float, reason: str) -> list[EvalSample]:
    threads = [
        StringThread([("user", f"{HOSTILE} {n}"), ("assistant", f"answer {n} of {model}")]) for n in range(count)
    ]
    grades = [Grade(value, "exact", reason), Grade(0.5, "judge", HOSTILE)]
    return [EvalSample(EvalSampleInteraction(thread, model), grades, "rows") for thread in threads]


def test_the_page_has_means_differences_and_answers(run: Run) -> None:
    samples = answers("a@1", 60, 1.0, "equal") + answers("b@1", 30, float("nan"), "it hung")
    add(run, metadata={"sample_count": 90}, tables=evaluation_tables(samples + answers("b@1", 30, 0.25, "near")))
    page = build_report(run.directory)
    text = html.unescape(page)
    assert HOSTILE not in page and HOSTILE in text
    assert "2.0 KiB" in text and "rows.jsonl" in text and "<td>90</td>" in page
    assert "<td>1.000*</td><td>0.500*</td>" in page and "<td>0.250 (30 unscored)</td><td>0.500*</td>" in page
    assert "b@1 - a@1" in text and "-0.750 to -0.750" in text
    assert "answers (50 of 120)" in text and "exact: unscored: it hung" in text
    assert page.count("answer 24 of") == 2 and "answer 25 of" not in page, "the same prompts for both models"


def test_entries_of_another_shape(run: Run) -> None:
    odd: list[dict[str, Any]] = [{"metadata": "x", "path": [1], "name": None, "bytes": "many", "kind": 3}]
    odd += [{"tables": found} for found in (3, [], {"t": 3}, {"t": {"rows": 3}}, {"t": {"rows": [3, ["kept"]]}})]
    for fields in odd:
        add(run, **fields)
    run.events.write("artifact", {})
    assert "<td>kept</td>" in build_report(run.directory)


def test_what_is_shown_is_bounded(run: Run) -> None:
    for _ in range(100):
        add(run, tables={"t": {"headers": ["h"], "rows": [["x" * 9000]] * 90}})
    page = build_report(run.directory)
    assert page.count("rows.jsonl") == LIMITS["rows"]
    assert len(page) < 1_200_000
