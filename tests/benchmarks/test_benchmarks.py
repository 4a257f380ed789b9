"""Every benchmark runs, with tiny models on the CPU, and writes the rows that it is for; figures mean nothing there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from source_tree import ROOT

FOLDER = ROOT / "benchmarks"

pytestmark = pytest.mark.slow


def run(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a script wrote; it must end well and print its table."""
    target = tmp_path / "rows.json"
    command = [sys.executable, str(FOLDER / script), "--tiny", "--json", str(target), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=840, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    content: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    assert "| row | measured | must reach | aim |" in done.stdout
    assert all(f"| {row['name']} |" in done.stdout for row in content["rows"])
    return content


def check(content: dict[str, Any], expected: dict[str, int], without_value: tuple[str, ...] = ()) -> None:
    """Rows whose names begin as expected, as many as expected; finite positive figures; the machine's description."""
    rows = content["rows"]
    for beginning, count in expected.items():
        found = [row for row in rows if row["name"].startswith(beginning)]
        assert len(found) == count, (beginning, [row["name"] for row in rows])
    assert sum(expected.values()) == len(rows), [row["name"] for row in rows]
    for row in rows:
        assert not row["note"].startswith("failed"), row
        if row["name"].startswith(without_value or ("-",)):
            assert row["value"] is None
        else:
            assert row["value"] is not None and math.isfinite(row["value"]) and row["value"] > 0, row
    machine = content["machine"]
    assert machine["device"] == "CPU" and machine["torch"] and machine["transformers"] and machine["processor"]
    assert machine["ceilings"]["copy_bytes_per_second"] > 1e8
    assert machine["ceilings"]["matmul_flop_per_second"] > 1e8
    assert content["seconds"]["total"] > 0


def test_decode(tmp_path: Path) -> None:
    content = run("decode.py", tmp_path)
    expected = {
        "decode 4, fraction of roofline": 2,
        "decode 8, fraction of roofline": 2,
        "decode 1, fraction of roofline": 1,
        "device time over whole job": 4,
        "prefill": 2,
        "ragged job": 1,
        "samples of one prompt": 1,
        "whole job, 4, over transformers generate": 1,
        "whole job, 4, over transformers continuous batching": 1,
        "decode 4, tp=2 over tp=1": 1,
    }
    check(content, expected)
    shares = [row["value"] for row in content["rows"] if row["name"].startswith("device time over whole job")]
    assert max(shares) <= 1.02, "the device cannot have worked longer than the job took"


def test_constrained(tmp_path: Path) -> None:
    content = run("constrained.py", tmp_path)
    check(content, {"constrained over free": 2})
    assert len(set(content["rows"][0]["detail"]["tokens"].values())) == 1, "the token counts are equal"


def test_grpo(tmp_path: Path) -> None:
    content = run("grpo.py", tmp_path)
    expected = {
        "seconds a step": 2,
        "rollout": 2,
        "MFU (6N) of training": 1,
        "MFU (4N) of training": 1,
        "share of a step in which the ranks wait for the driver": 2,
    }
    check(content, expected)
    for row in content["rows"]:
        if row["detail"]:
            assert sum(row["detail"]["phases"].values()) == pytest.approx(row["detail"]["step"], rel=0.05)


def test_train(tmp_path: Path) -> None:
    content = run("train.py", tmp_path)
    expected = {
        "MFU (6N), full fine-tune": 1,
        "MFU (4N), LoRA r16": 1,
        "from optim_step returning": 1,
        "training over padded batches": 1,
        "training over TRL's SFT": 1,
        "training, tp=2 over tp=1": 1,
    }
    trl = () if content["machine"]["versions"]["trl"] else ("training over TRL",)
    check(content, expected, without_value=trl)


def test_loss_head(tmp_path: Path) -> None:
    content = run("loss_head.py", tmp_path)
    check(content, {"loss head, extra memory": 1, "loss head, time over the dense head": 1}, ("loss head, extra",))
    loss, hidden, weight = content["rows"][1]["detail"]["differences"]
    assert loss < 1e-5 and hidden < 1e-4 and weight < 1e-4


def test_memory(tmp_path: Path) -> None:
    """A CPU's allocator counts no peaks, so there are no ratios."""
    content = run("memory.py", tmp_path)
    check(
        content, {"memory, full": 5, "memory, LoRA": 8, "memory, spawned again": 1, "memory, largest": 1}, ("memory",)
    )
    planned = [row["detail"]["planned"] for row in content["rows"] if "planned" in row["detail"]]
    assert len(planned) == 13 and all(plan["bytes"]["total"] > 0 for plan in planned)


def test_rows_that_do_not_exist_are_named(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "decode.py"), "--tiny", "--rows", "rooflines"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no such rows: rooflines; there are: roofline, job" in done.stderr


def test_parity(tmp_path: Path) -> None:
    rows = {row["name"]: row["value"] for row in run("parity.py", tmp_path)["rows"]}
    assert len(rows) == 15
    sides = ("sampler and trainer, mean", "sampler and trainer, largest", "K3 of sampler from trainer")
    for side in (*sides, "sampler and scorer, mean"):
        assert rows[f"cpu float32 deterministic: {side}"] == 0
        assert 0 < rows[f"cpu float32: {side}"] < 1e-3
