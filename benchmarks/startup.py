"""From the shell prompt to the first training step of a trivial recipe on the builtin model, with one rank.

    python benchmarks/startup.py [--rounds N] [--json FILE]

Each round is one `adaptive run` in a fresh process, clocked from outside and through the run's `events.jsonl`. What
torch, transformers and accelerate take to import is reported apart: in the rank as the rank clocked it, in the launcher
as a process of its own takes to import the same. What is left is ours: the driver, the recipe and its configuration,
the launcher's own work, the rank's start, the process group, the spawn, and the step. Rows are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import ROOT, Report, Row, machine

RECIPE = """\
from adaptive_harmony import StringThread
from adaptive_harmony.runtime import RecipeContext, recipe_main


@recipe_main
async def main(ctx: RecipeContext) -> None:
    model = await ctx.client.model("builtin:tiny-lm").spawn_train("policy", max_batch_size=256)
    thread = StringThread([("user", "a b c"), ("assistant", "c b a")])
    await model.train_language_modelling(thread.with_weight_last_assistant_turn())
    await model.optim_step(1e-3, 0.0, 1.0)
"""
IMPORT = """\
import gc, time
gc.disable()
started = time.perf_counter()
import accelerate.commands.launch
print(time.perf_counter() - started)
"""
"""What the launcher imports before it can start anything, as it imports it."""
MOST_SECONDS = 20.0
MOST_OURS = 2.0


def timestamp(event: dict[str, Any]) -> float:
    """When an event was written, in seconds since the epoch."""
    return datetime.fromisoformat(event["ts"].replace("Z", "+00:00")).timestamp()


def one_run(recipe: Path, home: Path) -> dict[str, float]:
    """Seconds of each phase of one run, and the CPU seconds of all its processes."""
    command = [sys.executable, "-P", "-m", "harmony_core.cli", "run", str(recipe), "--device", "cpu", "--quiet"]
    variables = {**os.environ, "ADAPTIVE_HOME": str(home)}
    before, started = cpu_seconds(), time.time()
    subprocess.run([*command, "--num-processes", "1"], env=variables, check=True)
    ended = time.time()
    newest = max((home / "runs").iterdir(), key=lambda run: run.stat().st_mtime)
    lines = (newest / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = {event["type"]: event for event in map(json.loads, lines)}
    at = {name: timestamp(event) - started for name, event in events.items()}
    rank: dict[str, float] = events["rank_ready"]["data"]["seconds"]
    return {
        "driver, up to the run's first event": at["run.start"],
        "launcher, up to the rank's first instruction": at["rank_ready"] - sum(rank.values()) - at["run.start"],
        **{f"rank: {name}": seconds for name, seconds in rank.items()},
        "spawn": at["spawn"] - at["rank_ready"],
        "first step": at["optim_step"] - at["spawn"],
        "to the first step": at["optim_step"],
        "end of the run": ended - started - at["optim_step"],
        "CPU time of the whole run": cpu_seconds() - before,
    }


def cpu_seconds() -> float:
    """User and system seconds of every process that has been waited for, and of those that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def launcher_import() -> float:
    """Seconds that a process takes for the launcher's imports."""
    return float(subprocess.run([sys.executable, "-P", "-c", IMPORT], capture_output=True, check=True).stdout)


def measure(rounds: int) -> dict[str, list[float]]:
    """Phases by name, one number a round, after a round that only warms the file system's cache."""
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "trivial.py"
        recipe.write_text(RECIPE, encoding="utf-8")
        for number in range(rounds + 1):
            found = one_run(recipe, Path(folder) / "home") | {"launcher: accelerate and torch": launcher_import()}
            print(f"  {found['to the first step']:.2f} s to the first step", file=sys.stderr)
            for name, seconds in found.items() if number else ():
                phases.setdefault(name, []).append(seconds)
    return phases


def rows(phases: dict[str, list[float]]) -> list[Row]:
    """Total, imports, ours, and then every phase."""
    libraries = ("rank: torch", "rank: transformers")
    middle = {name: statistics.median(seconds) for name, seconds in phases.items()}
    total = middle.pop("to the first step")
    imports = {name: middle.pop(name) for name in libraries}
    # The launcher cannot import faster than it got to the rank.
    start = middle["launcher, up to the rank's first instruction"]
    imports["launcher: accelerate and torch"] = min(start, middle.pop("launcher: accelerate and torch"))
    middle["launcher, up to the rank's first instruction"] = start - imports["launcher: accelerate and torch"]
    ours = total - sum(imports.values())
    return [
        Row("to the first step", total, must=MOST_SECONDS, unit="s", most=True, detail={"rounds": phases}),
        Row("of which ours", ours, must=MOST_OURS, unit="s", most=True),
        *(Row(f"imports, {name}", seconds, unit="s") for name, seconds in imports.items()),
        *(Row(f"ours, {name}" if name not in _AFTER else name, seconds, unit="s") for name, seconds in middle.items()),
    ]


_AFTER = ("end of the run", "CPU time of the whole run")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="from the shell prompt to the first training step")
    parser.add_argument("--rounds", type=int, default=5)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / f"{day}-startup.json")
    options = parser.parse_args()
    described = machine() | {"load_before": round(os.getloadavg()[0], 1)}
    report = Report("startup", options.json, described)
    phases = measure(options.rounds)
    for row in rows(phases):
        report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
