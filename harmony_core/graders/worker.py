"""The process that runs a synchronous grader: `python -m harmony_core.graders.worker PARENT`.

It reads lines of JSON from stdin: first the code to run, then one thread each. It answers each with one line:
{"value": number}, {"ignored": reason} or {"error": reason}. What the code prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from harmony_core.errors import IgnoreGradeException
from harmony_core.graders.base import as_score, reason_of
from harmony_core.recipe_file import import_file
from harmony_core.rpc.platform import die_with_parent
from harmony_core.text.threads import StringThread


def load(code: dict[str, Any]) -> Callable[[StringThread], Any]:
    """The function that the first line names: `function` of a file, or `grade` of a text."""
    sys.path.extend(entry for entry in code.get("path", ()) if entry not in sys.path)
    if "source" not in code:
        return getattr(import_file(Path(code["file"]), importable_folder=True), code["function"])  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grader.py"
        file.write_text(code["source"], encoding="utf-8")
        return import_file(file, importable_folder=False).grade  # type: ignore[no-any-return]


def graded(function: Callable[[StringThread], Any], line: bytes, runner: asyncio.Runner) -> dict[str, Any]:
    """The answer to one thread."""
    given = json.loads(line)
    thread = StringThread.from_json(given["thread"])
    thread.metadata = given["metadata"]
    try:
        found = function(thread)
        return {"value": as_score(runner.run(_awaited(found)) if inspect.isawaitable(found) else found)}
    except IgnoreGradeException as error:
        return {"ignored": error.message}
    except Exception as error:  # a grader is foreign code: its failure concerns one sample
        return {"error": reason_of(error)}


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def main() -> None:
    """Answer lines until stdin ends."""
    if not die_with_parent(int(sys.argv[1])):
        sys.exit(1)
    # The code gets neither end of the conversation: its stdin is empty, its prints go to stderr.
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        function = load(json.loads(lines.readline()))
    except Exception as error:  # what the file raises when it is imported is the answer
        return say({"error": reason_of(error)})
    say({"value": 0})
    with asyncio.Runner() as runner:
        for line in lines:
            say(graded(function, line, runner))


if __name__ == "__main__":
    main()
