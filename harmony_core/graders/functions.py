"""Graders made from a function, a function of a file, or Python text."""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from harmony_core.errors import DataError, NotFoundError, UsageError, did_you_mean, storing
from harmony_core.graders.base import BaseGrader, Grade, as_score, timed_out
from harmony_core.graders.lanes import Direct, Lanes, WorkerProcess
from harmony_core.recipe_file import import_file
from harmony_core.text.threads import StringThread

Function = Callable[[StringThread], Awaitable[float] | float]

MOST_PROCESSES = 4


class _ValueGrader(BaseGrader[dict[str, Any]]):
    """Grades and logs a value."""

    async def grade(self, sample: StringThread) -> Grade:
        """The function's value."""
        value = as_score(await self._value(sample))
        self.add_log({"score": value})
        return Grade(value, self.grader_key)

    @abstractmethod
    async def _value(self, sample: StringThread) -> Any:
        """The function's value."""

    async def _within(self, lanes: Lanes, given: Any) -> Any:
        try:
            return await lanes.call(given, self.timeout)
        except TimeoutError:
            raise timed_out(self.grader_key, self.timeout or 0) from None


class FunctionGrader(_ValueGrader):
    """See `BaseGrader.from_function`."""

    def __init__(self, grader_key: str, function: Function) -> None:
        super().__init__(grader_key)
        self._function = function
        self.keeps_time = not inspect.iscoroutinefunction(function)
        place = named_place(function) if self.keeps_time else None
        self._workers = _workers(grader_key, {"file": place[0], "function": place[1]}) if place else None
        self._thread = Lanes(lambda: Direct(function), 1)

    async def _value(self, sample: StringThread) -> Any:
        if not self.keeps_time:
            return await self._function(sample)  # type: ignore[misc]
        line = as_line(sample) if self._workers else None
        if self._workers and line:
            return await self._within(self._workers, line)
        found = await self._within(self._thread, sample)
        return await found if inspect.isawaitable(found) else found


class WorkerGrader(_ValueGrader):
    """Grades in worker processes, by a function that they load."""

    keeps_time = True

    def __init__(self, grader_key: str, code: dict[str, Any]) -> None:
        super().__init__(grader_key)
        self._workers = _workers(grader_key, code)

    async def _value(self, sample: StringThread) -> Any:
        if (line := as_line(sample)) is None:
            raise DataError("the thread's metadata cannot be written as JSON, which the grader's process needs")
        return await self._within(self._workers, line)


def grader_of_source(grader_key: str, source: str) -> WorkerGrader:
    """See `BaseGrader.from_source_code`."""
    if "grade" not in functions_in(source, f"grader {grader_key!r}"):
        raise UsageError(f"grader {grader_key!r}: the source defines no `grade`", hint="def grade(thread): ...")
    return WorkerGrader(grader_key, {"source": source})


def _workers(key: str, code: dict[str, Any]) -> Lanes:
    code["path"] = [entry for entry in sys.path if entry]
    return Lanes(lambda: WorkerProcess(key, code), min(MOST_PROCESSES, os.cpu_count() or 1))


def as_line(sample: StringThread) -> dict[str, Any] | None:
    """The thread for a worker; None if JSON does not give its metadata back as they are."""
    try:
        if json.loads(json.dumps(sample.metadata)) != sample.metadata:
            return None
        return {"thread": sample.to_json(), "metadata": sample.metadata}
    except (TypeError, ValueError):
        return None


def named_place(function: Any) -> tuple[str, str] | None:
    """The file and name by which another process finds a function; None for a closure, a lambda, or a script's own."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if not isinstance(function, FunctionType) or module is None or module.__name__ == "__main__":
        return None
    file, name = getattr(module, "__file__", None), function.__name__
    named = function.__qualname__ == name and getattr(module, name, None) is function
    return (os.path.abspath(file), name) if named and file and Path(file).suffix == ".py" else None


def functions_in(source: str, where: str) -> dict[str, bool | None]:
    """Names bound at the top level: whether a `def` is `async`; None for other names. Raises UsageError."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{where}:{getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', error)}") from None
    names: dict[str, bool | None] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = isinstance(node, ast.AsyncFunctionDef)
        elif isinstance(node, ast.Assign | ast.ImportFrom | ast.Import):
            found: list[Any] = [*(node.targets if isinstance(node, ast.Assign) else node.names)]
            names |= {getattr(n, "id", "") or getattr(n, "asname", "") or getattr(n, "name", ""): None for n in found}
    return names


def function_in(file: Path, name: str = "") -> tuple[str, bool]:
    """The grader function of a file and whether it is `async`: `name`, else `grade`, else its only function.

    The file is read, not run. Raises NotFoundError and UsageError.
    """
    if not file.is_file():
        raise NotFoundError(f"there is no file {file}", hint="a grader's file is written FILE.py or FILE.py:FUNCTION")
    with storing(f"cannot read {file}"):
        source = file.read_text(encoding="utf-8", errors="replace")
    names = functions_in(source, str(file))
    public = [known for known, is_async in names.items() if is_async is not None and not known.startswith("_")]
    chosen = name or ("grade" if "grade" in names else public[0] if len(public) == 1 else "")
    if not chosen and not public:
        raise UsageError(f"{file} defines no function", hint="def reward(thread): ...")
    if not chosen:
        raise UsageError(f"{file}: which of its functions grades?", hint=f"{file.name}:{(public or ['grade'])[0]}")
    if chosen not in names:
        raise NotFoundError(f"{file} defines no function '{chosen}'", hint=did_you_mean(chosen, public))
    return chosen, bool(names[chosen])


def grader_of_file(grader_key: str, file: Path, name: str = "") -> BaseGrader[Any]:
    """The grader by a function of a file. An `async` one runs in the event loop, any other in worker processes."""
    chosen, is_async = function_in(file, name)
    if is_async:
        return FunctionGrader(grader_key, getattr(import_file(file, importable_folder=True), chosen))
    return WorkerGrader(grader_key, {"file": str(file.absolute()), "function": chosen})
