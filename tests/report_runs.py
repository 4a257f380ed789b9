"""Runs' directories for tests of the report: written as a run writes them, without any rank."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

from harmony_core.home import Home
from harmony_core.journal import Journal, Piece, kept, tell_dropped, tell_sample
from harmony_core.loggers import EventLogger
from harmony_core.loggers.base import Table
from harmony_core.runs.run import Run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;"
ANSWERS = ("a b c d e", "a c b d e", "I would sort these letters as a, b, c, d and e.", HOSTILE, "é 😀 \n\tend")


def write_rl_run(home: Path, steps: int = 120, finish: bool = True, seed: int = 0) -> Run:
    """A GRPO-like run of two stages with samples, drops, phases, models, tables and a metric that is not finite."""
    draw = random.Random(seed)
    run = Run.create(Home.open(home), "sft_then_grpo", ["run", "sft_then_grpo", "--lr", "1e-3", "--steps", str(steps)])
    run.write_json("sources.json", {"model": "default", "lr": "--lr", "note": "config.yaml:4:7"})
    run.write_json("models.json", {"model": {"ref": "tiny@3", "digest": "94d4bc084aa789f5abcc", "path": "models/tiny"}})
    config = {"model": "tiny@3", "lr": 1e-3, "note": HOSTILE}
    run.events.write("config.resolved", {"recipe": "sft_then_grpo.py", "config": config})
    for name, kind in (("policy", "train"), ("reference", "inference")):
        held = {"weights": 1296000, "gradients": 1296000 if kind == "train" else 0, "kv": 150994944}
        spawn = {"name": name, "model": "tiny@3", "kind": kind, "adapter": False, "tp": 1, "replicas": 2}
        run.events.write(
            "spawn.planned", {**spawn, "max_batch_size": 4096, "bytes": {**held, "total": sum(held.values())}}
        )
        for rank in range(2):
            bytes_ = {"parameter_bytes": 1296000, "gradient_bytes": held["gradients"], "kv_bytes": 150994944}
            run.events.write(
                "spawn", {"model": name, "num_parameters": 324000, "trainable_parameters": 324000, **bytes_}, rank
            )
    for rank in range(2):
        run.events.write("rank_ready", {"device": "cpu", "seconds": {"torch": 1.1}}, rank)
    _stage(run, "SFT", steps // 3, draw)
    _stage(run, "GRPO", steps, draw)
    run.events.write("gate", {"name": "accuracy", "value": 0.93, "op": ">=", "threshold": 0.9, "passed": True})
    run.events.write("model.saved", {"model": "policy", "ref": "grpo@1", "step": steps})
    (run.directory / "logs" / "rank-0.log").write_text("rank 0 of 2\nwarning: something <odd>\n")
    if finish:
        run.finish("succeeded", 0, {"ok": True, "exit": 0, "result": {"model": "grpo@1", "reward": 0.93}, "errors": []})
    return run


def _stage(run: Run, name: str, steps: int, draw: random.Random) -> None:
    logger = EventLogger(run.events.write)
    logger.log_config({"algorithm": name, "lr": 1e-3, "samples_per_batch": 64})
    journal, moment = Journal(run.events.write), time.monotonic()
    names = ("rollout", "grading", "training", "optimizer") if name == "GRPO" else ("training", "optimizer")
    seconds = {"rollout": 0.9, "grading": 0.1, "training": 0.5, "optimizer": 0.08}
    for step in range(1, steps + 1):
        for phase in names:
            data = {"name": phase, "start": round(moment - journal._began, 6), "seconds": seconds[phase]}
            run.events.write("phase", data)
            moment += seconds[phase] + 0.02
        fraction = step / steps
        metrics: dict[str, Any] = {
            "loss": 4 * math.exp(-3 * fraction) + 0.1 * draw.random(),
            "grad_norm": 1.5 + 0.4 * draw.random() + (8 if step == steps // 2 else 0),
            "lr": 1e-3 * math.cos(fraction * 1.5),
            "completion_percentage": fraction,
        }
        if name == "GRPO":
            metrics["rewards/mean"] = 1 - math.exp(-4 * fraction) + 0.05 * draw.random()
            metrics["policy/kl"] = math.nan if step == 7 else 0.01 * step * draw.random()
        run.events.write("optim_step", {"model": "policy", "loss": metrics["loss"], "step": step})
        if step == steps:
            metrics["generation/samples"] = Table(["prompt", "response"]).add_rows(
                [["sort: c a b", a] for a in ANSWERS]
            )
        logger(metrics)
        if step % max(steps // 10, 1) == 0:
            with kept(run.events.write):
                tell_dropped({"sample_too_long": 2}, last="the sample has 9000 tokens", taken=step * 64)
                tell_dropped({"unscored_grade_timed_out": 3}, last="no score within 60 s")
                for number, answer in enumerate(ANSWERS):
                    _tell(step, name, answer, number, draw)


def _tell(step: int, stage: str, answer: str, number: int, draw: random.Random) -> None:
    pieces = [Piece(part, 1.0 if place % 3 else 0.5, -2 * draw.random()) for place, part in enumerate(_parts(answer))]
    turns = [("system", [Piece("You sort letters.")]), ("user", [Piece("sort: e d c b a")]), ("assistant", pieces)]
    if stage == "GRPO":
        reward = round(draw.random(), 2)
        tell_sample(
            step,
            turns,
            source="rollout",
            reward=reward,
            advantage=2 * reward - 1,
            group=number // 3,
            grades={"exact": reward},
        )
    else:
        tell_sample(step, turns)


def _parts(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def write_failed_run(home: Path) -> Run:
    """A run that failed after a few steps."""
    run = Run.create(Home.open(home), "broken", ["run", "broken"])
    logger = EventLogger(run.events.write)
    for value in (3.0, 2.0, 1.0):
        logger({"loss": value})
    (run.directory / "logs" / "driver.log").write_text("Traceback (most recent call last):\n  boom\n")
    error = {
        "type": "StepFailed",
        "code": "step_failed",
        "message": "rank 1: gradients",
        "lines": ["rank 1: gradients are not finite", "hint: lower lr"],
    }
    run.finish("failed", 5, {"ok": False, "exit": 5, "errors": [error]})
    return run
