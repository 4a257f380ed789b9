"""A benchmark's table: each row is printed and stored as soon as it is there, so that a run cut short loses nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One figure. `value` is None where it was not measured, and `note` says why; `most`: small values are good."""

    name: str
    value: float | None
    must: float | None = None
    aim: float | None = None
    unit: str = ""
    most: bool = False
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Where the value stands."""
        if self.value is None:
            return "not run"
        if self.must is None:
            return "-"
        sign = -1 if self.most else 1
        if sign * self.value < sign * self.must:
            return "short"
        return "aim" if self.aim is not None and sign * self.value >= sign * self.aim else "reached"


class Report:
    """Rows of one benchmark with the machine they were measured on."""

    def __init__(self, name: str, path: Path | None, machine: dict[str, Any]) -> None:
        self.name, self.path, self.machine = name, path, machine
        self.rows: list[Row] = []
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Where the run's time went."""

    def add(self, row: Row) -> None:
        """Print and store a row."""
        self.rows.append(row)
        print(f"[{self.elapsed():6.1f} s] {line(row)}", flush=True)
        self.write()

    def say(self, text: str) -> None:
        """A line that is no figure."""
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def write(self) -> None:
        """Everything so far, whole at every moment."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
            "seconds": {**self.seconds, "total": self.elapsed()},
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
        }
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def finish(self) -> None:
        """The table once more, whole."""
        self.write()
        print(f"\n{table(self.rows)}\n", flush=True)


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def line(row: Row) -> str:
    """A row as one line of text."""
    goals = f" (must {number(row.must)}, aim {number(row.aim)}: {row.verdict})" if row.must is not None else ""
    return f"{row.name} = {number(row.value, row.unit)}{goals}{'  ' + row.note if row.note else ''}"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| row | measured | must reach | aim | | note |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        bound = "<= " if row.most else ""
        goals = [f"{bound}{number(goal)}" if goal is not None else "" for goal in (row.must, row.aim)]
        lines.append(
            f"| {row.name} | {number(row.value, row.unit)} | {goals[0]} | {goals[1]} | {row.verdict} | {row.note} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Versions, commit and processor; the device's part comes from the process that holds it."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "transformers", "triton", "accelerate", "peft")},
    }


def installed(name: str) -> str:
    """A distribution's version, or ""."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it; "" where it cannot be told."""

    def git(*arguments: str) -> str:
        try:
            run = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(run, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    found = os.environ.get("HARMONY_COMMIT", "") or git("rev-parse", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), "")
