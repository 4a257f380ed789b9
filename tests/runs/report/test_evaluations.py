"""Artifacts in a run's report: listed, with the means and some answers of evaluations."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_runs
from harmony_core.graders import Grade
from harmony_core.graders.evaluation import EvalSample, EvalSampleInteraction
from harmony_core.home import Home
from harmony_core.runs.report.evaluations import read_evaluations
from harmony_core.runs.report.page import build_report
from harmony_core.runs.run import Run
from harmony_core.text.threads import StringThread

HOSTILE = report_runs.HOSTILE


def answers(model: str, count: int, value: float = 1.0, reason: str | None = None) -> list[dict[str, Any]]:
    threads = [
        StringThread([("user", f"{HOSTILE} {n}"), ("assistant", f"answer {n} of {model}")]) for n in range(count)
    ]
    grades = [Grade(value, "exact", reason), Grade(0.5, "judge", HOSTILE)]
    return [EvalSample(EvalSampleInteraction(thread, model), grades, "rows").as_data() for thread in threads]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run.create(Home.open(tmp_path / "home"), "evaluate")
    yield made
    made.finish("succeeded", 0, {}, report=False)


def add(run: Run, lines: list[Any], path: str = "evaluation.jsonl", name: str = HOSTILE) -> dict[str, Any]:
    entry = {"id": path, "name": name, "kind": "eval", "path": path, "bytes": 2048, "metadata": {"sample_count": 3}}
    (run.directory / path).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    run.events.write("artifact", entry)
    return entry


def test_the_page_has_means_and_answers(run: Run) -> None:
    unscored = answers("b@1", 30, float("nan"), "it hung")
    add(run, answers("a@1", 60) + unscored + answers("b@1", 30, 0.25))
    run.events.write("artifact", {"name": None, "kind": 3, "path": [1], "metadata": "x"})
    page = build_report(run.directory)
    assert HOSTILE not in page and html.escape(HOSTILE, quote=False)[:20] in page
    text = html.unescape(page)
    assert "2.0 KiB" in text and "evaluation.jsonl" in text
    assert "<td>1</td><td>0.5</td>" in page and "<td>0.25 (30 unscored)</td><td>0.5</td>" in page
    assert "50 of 120 answers" in page
    assert "unscored: it hung" in page and f"0.5: {HOSTILE}" in text
    assert page.count("answer 24 of") == 2 and "answer 25 of" not in page, "the same prompts for both models"


def test_files_that_are_not_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outside.jsonl").write_text(json.dumps(answers("a", 1)[0]) + "\n")
    (run.directory / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    base = {"kind": "eval", "name": "n"}
    entries = [{**base, "path": path} for path in (str(tmp_path / "outside.jsonl"), "link.jsonl", "gone", "a\0b")]
    for number, content in enumerate(("{", "[]\n", '{"interaction": 1}\n', '{"interaction": {"New": {"turns": 3}}}\n')):
        (run.directory / f"{number}.jsonl").write_text(content)
        entries.append({**base, "path": f"{number}.jsonl"})
    for entry in entries:
        assert read_evaluations(run.directory, [entry], 50, 100) == [], entry


def test_long_texts_and_many_models_are_bounded(run: Run) -> None:
    entry = add(run, [row for n in range(80) for row in answers(f"m{n}", 1, reason="x" * 500)])
    (found,) = read_evaluations(run.directory, [entry], 50, 100)
    assert len(found.rows) == 50 and len(found.means) == 80
    assert max(len(cell) for row in found.rows for cell in row) <= 100
