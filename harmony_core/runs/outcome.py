"""How a run ended: the exit code, and the same as plain data for `result.json` and `--json`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from harmony_core.errors import HarmonyError
from harmony_core.plain_data import plain
from harmony_core.rpc.tracebacks import describe, frames_in, is_own, place_of, summary

Status = Literal["succeeded", "failed", "stopped", "planned"]


@dataclass
class Outcome:
    """What came of a recipe."""

    exit_code: int = 0
    status: Status = "succeeded"
    result: Any = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """How many rows of each dataset are too long: of a dry run."""
    planned_until: str = ""
    """Where a dry run ended."""
    resume: dict[str, Any] | None = None
    """From where and how the run can be resumed."""

    def fail(self, error: BaseException) -> None:
        """Record an error; of several, the lowest exit code counts."""
        code = exit_code_of(error)
        self.exit_code = code if self.exit_code == 0 else min(self.exit_code, code)
        self.status = "failed"
        self.errors.append(error_data(error))

    def as_data(self, run_id: str | None) -> dict[str, Any]:
        """The object that `--json` prints."""
        data: dict[str, Any] = {
            "ok": self.exit_code == 0,
            "exit": self.exit_code,
            "code": self.errors[0]["code"] if self.errors else "gate_failed" if self.exit_code == 8 else self.status,
            "status": self.status,
            "run": run_id,
            **{name: plain(getattr(self, name)) for name in ("result", "gates", "models", "errors", "resume")},
        }
        if self.status == "planned":
            data |= {"plan": plain(self.plan), "rows": plain(self.rows), "planned_until": self.planned_until or None}
        return data


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group; an error that is no group is its only one."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def exit_code_of(error: BaseException) -> int:
    """Of our errors their own code, of anything else 1; of a group the lowest."""
    return min(leaf.exit_code if isinstance(leaf, HarmonyError) else 1 for leaf in leaves(error))


def error_data(error: BaseException) -> dict[str, Any]:
    """One error for people (`lines`) and for programs."""
    data: dict[str, Any] = {"type": type(error).__name__, "where": place_of(error)}
    if isinstance(error, HarmonyError):
        issues = error.details.get("issues")
        data |= {"code": error.code, "message": error.message, "hint": error.hint}
        data["lines"] = _typed_lines(error, list(issues) if isinstance(issues, list) else [])
        if details := {k: v for k, v in error.details.items() if k not in ("issues", "traceback")}:
            data["details"] = details
    elif isinstance(error, asyncio.CancelledError):
        message = "the recipe cancelled itself"
        data |= {"code": "recipe_cancelled", "message": message, "lines": [message]}
    else:
        data |= {"code": "recipe_raised", "message": summary(error), "lines": describe(error)}
    return data


def _typed_lines(error: HarmonyError, issues: list[str]) -> list[str]:
    """Message, place in the recipe, notes and hint; no frames: our errors say themselves what is wrong."""
    lines = issues if issues else error.message.splitlines()
    own = [frame for frame in frames_in(error.__traceback__) if is_own(frame)]
    lines = [*lines, *(f"  {frame.filename}:{frame.line} in {frame.function}" for frame in own[-3:])]
    lines += [f"  note: {note}" for note in getattr(error, "__notes__", ())]
    if error.hint:
        lines += [f"hint: {line}" if i == 0 else f"      {line}" for i, line in enumerate(error.hint.splitlines())]
    return lines
