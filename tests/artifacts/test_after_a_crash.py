"""What is listed when the process is killed while it writes an artifact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from harmony_core.home import Home
from harmony_core.runs.records import list_runs

SESSION = """
import asyncio, os, signal
from harmony_core.artifacts import CustomArtifact
from harmony_core.recipe.context import RecipeConfig, RecipeContext

async def main():
    async with RecipeContext.from_config(RecipeConfig(num_gpus=1)) as ctx:
        CustomArtifact("whole", ctx, file="whole.txt").append("all of it")
        whole = CustomArtifact("finalised", ctx, file="finalised.txt")
        whole.write("all of it")
        whole.finalize()
        half = CustomArtifact("half", ctx, file="half.txt")
        half.append("half of")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_only_what_was_finalised(tmp_path: Path) -> None:
    environment = os.environ | {"ADAPTIVE_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", SESSION], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (record,) = list_runs(Home.open(tmp_path / "home"))
    assert record.status == "crashed"
    (entry,) = record.artifacts()
    file = record.directory / entry["path"]
    assert entry["name"] == "finalised" and file.read_text() == "all of it"
    assert [path.name for path in file.parent.iterdir() if not path.name.startswith(".")] == ["finalised.txt"]
