"""No path through the source grows: files and functions on the way of a run, a completion, and a decode step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from source_tree import ROOT

MOST = {
    "run sft --dry-run, to the spawn's plan": (47, 372),
    "run sft, to the spawn": (58, 468),
    "run sft, to the first micro-batch": (78, 665),
    "generate, on the driver": (14, 70),
    "decode step, on the rank": (15, 72),
}
"""Of each way the most files and functions: a little more than was counted, since a busy machine takes a few more."""


@pytest.mark.slow
def test_the_ways_are_no_longer_than_they_were(tmp_path: Path) -> None:
    target = tmp_path / "paths.json"
    command = [sys.executable, str(ROOT / "benchmarks/path_length.py"), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-4000:]
    ways = {
        way: (len({name.split()[0] for name in names}), len(names))
        for way, names in json.loads(target.read_text()).items()
    }
    assert ways.keys() == MOST.keys()
    assert {way: size for way, size in ways.items() if size[0] > MOST[way][0] or size[1] > MOST[way][1]} == {}
