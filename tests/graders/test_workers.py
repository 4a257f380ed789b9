"""Plain functions as graders: in processes that can be killed, or in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from harmony_core.errors import HarmonyError, NotFoundError, UsageError
from harmony_core.graders import BaseGrader, score_or_refuse
from harmony_core.graders.functions import function_in, grader_of_file
from harmony_core.text.threads import StringThread
from leftovers import until, wait_until
from poisoned_graders import by_answer


def thread(answer: str, metadata: Any = None) -> StringThread:
    return StringThread([("user", "q"), ("assistant", answer)], metadata)


async def outcome(grader: BaseGrader[Any], sample: StringThread) -> float | str:
    try:
        return await score_or_refuse(grader, sample)
    except HarmonyError as error:
        return f"{error.code}: {error.message}"


def outcomes(grader: BaseGrader[Any], *answers: str) -> dict[str, float | str]:
    async def every() -> list[float | str]:
        return list(await asyncio.gather(*(outcome(grader, thread(answer)) for answer in answers)))

    return dict(zip(answers, asyncio.run(every()), strict=True))


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            found += [child] if "harmony_core.graders.worker" in child.cmdline() else []
    return found


def until_no_worker() -> None:
    assert wait_until(lambda: bool(gc.collect() or True) and not workers(), 20)


def test_every_way_to_fail_costs_one_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that holds the interpreter's lock for ever, one that ends its process, one that speaks out of turn."""
    monkeypatch.setenv("MY_TOKEN", "abcdefghijkl")
    grader = BaseGrader.from_function("f", by_answer)
    grader.timeout = 1.0
    ways = ("one", "raise", "hang", "die", "ignore", "text", "none", "nan", "print", "environment", "three")
    found = outcomes(grader, *ways)
    assert (found["one"], found["three"], found["print"]) == (3.0, 5.0, 5.0)
    assert found["environment"] == 0.0, "secrets of the environment stay behind"
    assert str(found["raise"]).startswith("grade_failed: grader 'f' raised KeyError: 'x' (")
    assert "poisoned_graders.py" in str(found["raise"])
    assert found["hang"] == "grade_timed_out: grader 'f' gave no score within 1 s"
    assert found["die"] == "grade_failed: the process of grader 'f' ended with status 3"
    assert found["ignore"] == "grade_ignored: not this one"
    assert "a score is a number, not '0.5'" in str(found["text"]) and "TypeError" in str(found["none"])
    assert found["nan"] == "grade_failed: grader 'f' gave the score nan"
    assert workers()
    assert outcomes(grader, "again") == {"again": 5.0}, "from another event loop"
    # The error raised last in each process refers to the grader, and does not keep it.
    assert "KeyError" in str(outcomes(grader, "raise"))
    del grader
    until_no_worker()


def test_waiting_for_a_worker_does_not_count_and_a_cancelled_grade_ends_it() -> None:
    grader = BaseGrader.from_source_code("s", "import time\ndef grade(t):\n    time.sleep(0.2)\n    return 1.0")
    grader.timeout = 0.6
    assert set(outcomes(grader, *map(str, range(4 * (os.cpu_count() or 1)))).values()) == {1.0}

    async def cancelled() -> None:
        slow = BaseGrader.from_source_code("s", "import time\ndef grade(t):\n    time.sleep(1000)")
        task = asyncio.ensure_future(slow.grade(thread("x")))
        await until(lambda: any(worker.status() == psutil.STATUS_SLEEPING for worker in workers()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    del grader
    until_no_worker()


def test_metadata_reach_the_worker_and_what_json_cannot_hold_stays_here() -> None:
    source = "async def grade(t):\n    return t.metadata['n'] + len(t.get_turns())"
    grader = BaseGrader.from_source_code("s", source)
    assert asyncio.run(score_or_refuse(grader, thread("x", {"n": 3}))) == 5.0
    assert "cannot be written as JSON" in str(asyncio.run(outcome(grader, thread("x", {"n": {1}}))))
    del grader
    until_no_worker()
    grader = BaseGrader.from_function("f", by_answer)
    assert asyncio.run(score_or_refuse(grader, thread("four", {"n": (1, 2)}))) == 4.0
    assert not workers(), "it ran in a thread"


def test_a_closure_runs_in_one_thread_that_is_left_alone_when_it_is_stuck() -> None:
    leave, seen = threading.Event(), []

    def grade(sample: StringThread) -> float:
        seen.append(sample.last_content())
        if sample.last_content() == "hang":
            leave.wait()
        return 1.0

    grader = BaseGrader.from_function("f", grade)
    grader.timeout = 0.3
    found = outcomes(grader, "a", "hang", "b", "c")
    assert (found["a"], found["b"], found["c"]) == (1.0, 1.0, 1.0)
    assert str(found["hang"]).startswith("grade_timed_out")
    assert seen == ["a", "hang", "b", "c"], "one after the other"
    leave.set()
    assert not workers()


def test_a_coroutine_function_is_cut_at_the_timeout() -> None:
    async def grade(sample: StringThread) -> float:
        if sample.last_content() == "hang":
            await asyncio.Event().wait()
        return 1.0

    grader = BaseGrader.from_function("f", grade)
    grader.timeout = 0.1
    found = outcomes(grader, "a", "hang")
    assert found == {"a": 1.0, "hang": "grade_timed_out: grader 'f' gave no score within 0.1 s"}


def test_files_and_source_are_checked_before_they_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(NotFoundError, match="there is no file"):
        function_in(file)
    file.write_text("import json\ndef _helper(): ...\ndef reward(t): return 2\nasync def later(t): return 3\n")
    with pytest.raises(UsageError, match="which of its functions"):
        function_in(file)
    with pytest.raises(NotFoundError, match="no function 'rewrad'"):
        function_in(file, "rewrad")
    assert function_in(file, "json") == ("json", False)
    assert function_in(file, "later") == ("later", True)
    assert asyncio.run(score_or_refuse(grader_of_file("k", file, "later"), thread("x"))) == 3.0
    assert asyncio.run(score_or_refuse(grader_of_file("k", file, "reward"), thread("x"))) == 2.0
    file.write_text("import json\nimport re\nLIMIT = 3\ndef reward(t): return 2\n")
    assert function_in(file) == ("reward", False)
    file.write_text("import json\nLIMIT = 3\n")
    with pytest.raises(UsageError, match="defines no function"):
        function_in(file)
    with pytest.raises(UsageError, match="defines no `grade`"):
        BaseGrader.from_source_code("s", "def score(t): return 1")
    with pytest.raises(UsageError, match="grader 's':2: expected ':'"):
        BaseGrader.from_source_code("s", "x = 1\ndef grade(t) return 1")
    file.write_text("import nothing_of_this_name\ndef grade(t): return 2\n")
    assert "nothing_of_this_name" in str(asyncio.run(outcome(grader_of_file("k", file), thread("x"))))
    until_no_worker()
