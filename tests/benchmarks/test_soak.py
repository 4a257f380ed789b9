"""A short soak: faults around a run that is resumed; and what counts as growth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harmony_core.recipe_file import import_file
from source_tree import ROOT

SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_file(SCRIPT, importable_folder=False)


@pytest.mark.parametrize(
    ("last", "verdicts"),
    [
        ((100, 20, 5), ["reached"] * 3),
        ((120, 20, 5), ["short", "reached", "reached"]),
        ((100, 23, 7), ["reached", *["short"] * 2]),
    ],
)
def test_a_process_that_grows_is_seen(soak: ModuleType, last: tuple[float, ...], verdicts: list[str]) -> None:
    start, first = [(500.0, 90.0, 50.0)] * 10, [(100.0, 20.0, 5.0)] * 50
    rows = soak.growth("rank 0", [*start, *first, *[last] * 40])
    assert [row.verdict for row in rows] == verdicts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("no mount namespace here")
    target = tmp_path / "rows.json"
    sizes = ["--minutes", "0", "--steps", "6", "--ranks", "1"]
    command = [sys.executable, str(SCRIPT), *sizes, "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = {row["name"]: row for row in json.loads(target.read_text(encoding="utf-8"))["rows"]}
    assert rows["problems"]["value"] == 0, done.stdout
    assert rows["faults"]["value"] >= 1 and rows["rounds that they disturbed"]["value"] >= 1, done.stdout
    assert {"cli: memory, MiB, growth", "rank 0: descriptors, growth", "rank 0: threads, growth"} <= set(rows)
