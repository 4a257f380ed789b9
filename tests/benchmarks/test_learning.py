"""`benchmarks/learning.py`, and whether docs/learning.md shows what its results say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from source_tree import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-learning*.json"))
PAGE = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")


def learning(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "learning.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=840)


def method(**changes: Any) -> dict[str, Any]:
    runs = [
        {"seed": 1, "steps": [0, 10], "values": [0.5, 0.9], "cpu_seconds": 1.0, "seconds": 1.0},
        {"seed": 2, "steps": [0, 10], "values": [0.6, 0.8], "cpu_seconds": 1.0, "seconds": 1.0},
    ]
    described = {"name": "a", "title": "A <b>", "measure": "accuracy", "unit": "steps", "command": "a", "runs": runs}
    return {**described, "at_least": None, "gain": None, **changes}


def test_the_page_shows_every_result_and_every_picture_as_it_is_drawn(tmp_path: Path) -> None:
    done = learning("--draw-only", *RESULTS, "--pictures", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        assert line in PAGE.splitlines(), line
    shown = set(re.findall(r"\]\(pictures/([\w-]+\.svg)\)", PAGE))
    assert shown == {file.name for file in tmp_path.iterdir()} == {f.name for f in (ROOT / "docs/pictures").iterdir()}
    for name in shown:
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / "pictures" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"at_least": 0.8}, 0), ({"at_least": 0.85}, 1), ({"gain": 0.2}, 0), ({"gain": 0.25}, 1), ({}, 0)],
)
def test_a_run_below_the_bar_is_told_by_the_exit_code(tmp_path: Path, changes: dict[str, float], code: int) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"methods": [method(**changes)]}), encoding="utf-8")
    done = learning("--draw-only", file, "--pictures", tmp_path)
    assert done.returncode == code, done.stderr
    picture = (tmp_path / "learning-a.svg").read_text(encoding="utf-8")
    assert "A &lt;b&gt;" in picture
    assert picture.count('class="line c0"') == picture.count('class="line c1"') == 2, "a line and its key"
    assert picture.count('class="bar"') == len(changes)


@pytest.mark.slow
def test_a_recipe_is_run_and_its_curve_stored(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ("--recipes", "dpo", "--seeds", "5", "--json", file, "--pictures", tmp_path, "--", "--epochs", "0.2")
    done = learning(*words)
    assert done.returncode == 1, "five steps are not enough"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["benchmark"] == "learning" and content["machine"]["torch"]
    (found,) = content["methods"]
    (run,) = found["runs"]
    assert found["command"] == "adaptive run dpo --seed SEED --save-as null --epochs 0.2"
    assert run["seed"] == 5 and run["cpu_seconds"] > 1 and run["seconds"] > 1
    assert run["steps"] == sorted(set(run["steps"])) and run["steps"][0] == 0 and run["steps"][-1] == 10
    assert len(run["values"]) == len(run["steps"]) and run["values"][0] == 0.5, "no pair has moved yet"
    assert (tmp_path / "learning-dpo.svg").exists()
