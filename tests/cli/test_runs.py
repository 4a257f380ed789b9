"""`adaptive runs report`: where the page goes, and who is shown it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmony_core.home import Home
from harmony_core.run import list_runs


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages that a browser would have been asked for."""
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return pages


def test_a_run_leaves_a_report_and_says_where(adaptive: Any, shown: list[str]) -> None:
    done = adaptive("run", "hello.py", "--device", "cpu", "--lr", "0.25")
    (record,) = list_runs(Home.open())
    page = record.directory / "report.html"
    assert f"report {page}" in done.err.splitlines()
    assert "0.25" in page.read_text("utf-8") and "succeeded" in page.read_text("utf-8")
    assert adaptive("runs", "show", "--json").json["run"]["report"] == str(page)

    page.unlink()
    done = adaptive("runs", "report")
    assert (done.code, done.out) == (0, f"{page}\n") and page.is_file()
    done = adaptive("runs", "report", record.id, "--output", "mine.html", "--open", "no", "--json")
    assert done.json == {"ok": True, "exit": 0, "run": record.id, "report": str(Path("mine.html").absolute())}
    assert Path("mine.html").read_text("utf-8").startswith("<!doctype html>")
    assert shown == [], "stdout is no terminal"
    adaptive("runs", "report", "--open", "yes")
    assert shown == [page.as_uri()]


def test_a_failed_run_has_a_report(adaptive: Any) -> None:
    done = adaptive("run", "hello.py", "--device", "cpu", "--note", "raise")
    assert done.code == 1
    page = (list_runs(Home.open())[0].directory / "report.html").read_text("utf-8")
    assert "What went wrong" in page and "ValueError: as asked" in page and "driver.log" in page


def test_a_dry_run_has_none(adaptive: Any) -> None:
    assert "report" not in adaptive("run", "hello.py", "--dry-run").err


def test_what_can_go_wrong(adaptive: Any) -> None:
    assert adaptive("runs", "report").code == 3
    adaptive("run", "hello.py", "--device", "cpu")
    done = adaptive("runs", "report", "--output", "no/such/folder/x.html")
    assert done.code == 4 and "cannot write the report" in done.errors[0]
    done = adaptive("runs", "report", "--open", "maybe")
    assert done.code == 2
