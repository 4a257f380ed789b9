"""The evaluation recipe: several models and graders, artifacts, intervals."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROWS = [("ba", "ab"), ("cba", "abc"), ("dcb", "bcd"), ("ed", "de")]
GRADERS = """
def short(thread):
    return 1.0 if len(thread.completion()) <= 8 else 0.0

def poisoned(thread):
    if thread.messages()[0][1] in ("ba", "ed"):
        raise ValueError("it is poisoned")
    return 0.5
"""


def adaptive(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ADAPTIVE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "harmony_core.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, graders, and in its home a second model: the built-in one under another key."""
    made = tmp_path_factory.mktemp("evaluate")
    lines = [{"prompt": asked, "completion": answer} for asked, answer in ROWS]
    (made / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (made / "mine.py").write_text(GRADERS)
    assert adaptive(made, "models", "add", "twin", "builtin:tiny-lm").returncode == 0
    return made


def test_two_models_and_two_graders(folder: Path) -> None:
    words = ("--models", "builtin:tiny-lm,twin", "--graders", "mine.py:short,mine.py:poisoned", "--max-gen-len", "12")
    done = adaptive(folder, "run", "evaluate", "--dataset", "rows.jsonl", *words, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    scores: dict[str, dict[str, Any]] = found["result"]["scores"]
    assert scores["builtin:tiny-lm"] == scores["twin"] and list(scores) == ["builtin:tiny-lm", "twin"]
    poisoned = next(name for name in scores["twin"] if "poisoned" in name)
    assert scores["twin"][poisoned] == 0.5, "the failed grades are in no mean"
    assert found["result"]["graded"] in (2, 4) and found["result"]["answered"] == found["result"]["rows"] == 4
    (difference,) = [d for d in found["result"]["differences"] if d["grader"] == poisoned]
    assert (difference["mean"], difference["low"], difference["high"], difference["prompts"]) == (0.0, 0.0, 0.0, 2)
    row = next(line for line in done.stderr.splitlines() if line.startswith(poisoned))
    assert row.split() == [poisoned, "twin", "-", "builtin:tiny-lm", "+0.000", "+0.000", "to", "+0.000", "2"]
    assert "0.500* (2 unscored)" in done.stderr

    shown = adaptive(folder, "runs", "show", found["run"])
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("artifact") and " eval, " in line]
    assert "evaluation: eval, 8 samples, " in line
    file = Path(line.rpartition(", ")[2])
    samples = [json.loads(text) for text in file.read_text().splitlines()]
    assert len(samples) == 8 and file.parent.name == "artifacts"
    listed = json.loads(adaptive(folder, "runs", "show", found["run"], "--json").stdout)["artifacts"]
    assert [entry["kind"] for entry in listed] == ["custom"] * 3 + ["eval"]
    page = html.unescape((folder / "home" / "runs" / found["run"] / "report.html").read_text("utf-8"))
    for text in ("answers (8 of 8)", "+0.000 to +0.000", "(2 unscored)", "it is poisoned"):
        assert text in page


def test_one_model_and_a_bar(folder: Path) -> None:
    words = ("--dataset", "rows.jsonl", "--at-least", "0.5", "--max-gen-len", "8", "--device", "cpu", "--json")
    done = adaptive(folder, "run", "evaluate", *words)
    assert done.returncode == 8, done.stderr
    found = json.loads(done.stdout)
    assert found["result"]["score"] == found["gates"][0]["value"] == 0.0 and found["result"]["graded"] == 4
    assert found["result"]["differences"] == []
