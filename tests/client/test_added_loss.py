"""A loss that is added as CONTRIBUTING.md says trains, is checked by its row, and is in the documentation's table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STEP = """
import asyncio, json, math, sys
from pathlib import Path
from engines import pairs, start_engine, stop_engine
from docs.loss_table import table
from harmony_core.errors import HarmonyError

async def refusal(call):
    try:
        await call
    except HarmonyError as error:
        return error.message

async def work():
    model = await engine.client.model("builtin:tiny-lm", kv_cache_len=512).spawn_train("policy", 256)
    threads = [await model.tokenize_thread(thread) for thread in pairs(3)]
    short, count = 0.0, 0
    for number, thread in enumerate(threads):
        logprobs = await model.logprobs_per_token(thread)
        floors = [x + (-1) ** t * (0.1 + number) for t, x in enumerate(logprobs)]
        short += sum(min(max(floor - x, 0.0), 1.5) for floor, x in zip(floors, logprobs))
        count += len(logprobs)
        await model.train_hinge(thread, floors, 3.0, cap=1.5)
    step = await model.optim_step(0.0, 0.0, 1.0)
    refused = [
        await refusal(model.train_hinge(threads[0], [1.0], 3.0)),
        await refusal(model.train_hinge(threads[0], [1.0] * int(sum(threads[0].token_weights)), -3.0)),
    ]
    return {"expected": 3.0 * short / count, **step, "refused": refused, "table": table()}

engine = start_engine(Path(sys.argv[1]), 1)
found = engine.run(work())
stop_engine(engine)
print(json.dumps(found))
"""


def test_the_documented_way_adds_a_loss(tmp_path: Path) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## To add a loss\n")[1].split("\n## ")[0]
    row, formula = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copytree(ROOT / "harmony_core", tmp_path / "harmony_core", ignore=shutil.ignore_patterns("__pycache__"))
    handle = tmp_path / "harmony_core/client/training_model.py"
    before, after = handle.read_text("utf-8").split("    def train_custom(")
    handle.write_text(f"{before}{row}\n    def train_custom({after}", "utf-8")
    with (tmp_path / "harmony_core/engine/training/losses.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{formula}")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", STEP, str(tmp_path / "home")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-5) and found["grad_norm"] > 0.01
    few, negative = found["refused"]
    assert few.startswith("floors: 1 values for ") and negative == "slope must be a finite number, 0 or more, not -3.0"
    assert "| `train_hinge` | log-probs of weighted tokens | `floors` one for each weighted token |" in found["table"]
