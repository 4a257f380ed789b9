"""Rewards that a program checks: an exact answer, a regular expression, JSON, mathematics."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from harmony_core.errors import ResourceError, UsageError
from harmony_core.graders.base import BaseGrader
from harmony_core.graders.functions import WorkerGrader
from harmony_core.text.threads import StringThread

ANSWER = "answer"
"""The metadata's field with the right answer."""


def answers_of(thread: StringThread) -> list[str]:
    """`metadata["answer"]` as a list: one answer, or several that are all right. Raises ValueError without one."""
    found = thread.metadata.get(ANSWER) if isinstance(thread.metadata, dict) else None
    if found is None:
        raise ValueError(f"metadata[{ANSWER!r}] is missing")
    return [str(answer) for answer in (found if isinstance(found, list | tuple) else [found])]


async def exact_match(thread: StringThread) -> float:
    """1 if the completion is an answer, apart from space around both; else 0."""
    return float((thread.completion() or "").strip() in [answer.strip() for answer in answers_of(thread)])


def contains_match(thread: StringThread) -> float:
    """1 if an answer, a regular expression, is found in the completion; else 0."""
    return float(any(re.search(pattern, thread.completion() or "") for pattern in answers_of(thread)))


async def valid_json(thread: StringThread) -> float:
    """1 if the completion is a JSON value; else 0."""
    try:
        from_json((thread.completion() or "").strip())
    except ValueError:
        return 0.0
    return 1.0


def math_equal(thread: StringThread) -> float:
    """1 if math-verify finds the completion's last expression equal to an answer; else 0."""
    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    # Its own timeouts need the main thread's signals; the grader's process is killed instead.
    found = parse(thread.completion() or "", parsing_timeout=None)
    golds = [parse(answer, parsing_timeout=None) for answer in answers_of(thread)]
    return float(any(verify(gold, found, timeout_seconds=None) for gold in golds))


def exact_match_grader(grader_key: str = "exact_match") -> BaseGrader[Any]:
    """1 if the completion is `metadata["answer"]`, or one of them, apart from space around it; else 0."""
    return BaseGrader.from_function(grader_key, exact_match)


def regex_grader(grader_key: str = "regex", pattern: str | None = None) -> BaseGrader[Any]:
    """1 if the regular expression, by default `metadata["answer"]`, is found in the completion; else 0.

    It runs in worker processes, since an expression may take for ever. Raises UsageError for one that is invalid.
    """
    if pattern is None:
        return BaseGrader.from_function(grader_key, contains_match)
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None
    found = f"re.search({pattern!r}, thread.completion() or '')"
    source = f"import re\ndef grade(thread):\n    return float(bool({found}))\n"
    return BaseGrader.from_source_code(grader_key, source)


def json_grader(grader_key: str = "json", schema: type[BaseModel] | None = None) -> BaseGrader[Any]:
    """1 if the completion is a JSON value, and of the pydantic model `schema` if there is one; else 0."""
    if schema is None:
        return BaseGrader.from_function(grader_key, valid_json)

    async def validates(thread: StringThread) -> float:
        try:
            schema.model_validate_json((thread.completion() or "").strip())
        except ValidationError:
            return 0.0
        return 1.0

    return BaseGrader.from_function(grader_key, validates)


def math_grader(grader_key: str = "math") -> BaseGrader[Any]:
    """1 if the completion's last expression equals `metadata["answer"]` mathematically; else 0.

    Raises ResourceError if math-verify is not installed: `pip install 'harmony-core[math]'`.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ResourceError("math-verify is not installed", hint="pip install 'harmony-core[math]'")
    return WorkerGrader(grader_key, {"file": __file__, "function": math_equal.__name__})


BUILTIN: dict[str, Callable[[str], BaseGrader[Any]]] = {
    "builtin:exact_match": exact_match_grader,
    "builtin:regex": regex_grader,
    "builtin:json": json_grader,
    "builtin:math": math_grader,
}
"""Grader keys that are always there."""
