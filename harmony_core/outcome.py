"""How a run ended: the exit code, and the same as plain data for `result.json` and `--json`."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from harmony_core.errors import HarmonyError
from harmony_core.frames import describe, frames_in, is_own, place_of, summary

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
            "result": plain(self.result),
            "gates": plain(self.gates),
            "models": plain(self.models),
            "errors": plain(self.errors),
            "resume": plain(self.resume),
        }
        if self.status == "planned":
            data |= {"plan": plain(self.plan), "planned_until": self.planned_until or None}
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


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON can carry; anything else as text. Infinite and undefined numbers become text too."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth > 32:
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value, depth + 1)
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"), depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        return plain(item(), depth + 1)
    return str(value)
