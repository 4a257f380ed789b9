"""One place where a grader's code meets ours: whatever it does, a sample has a finite score or a counted reason."""

from __future__ import annotations

import math
from typing import Any

from harmony_core.errors import EngineError, GradeFailed, IgnoreGradeException
from harmony_core.graders.base import BaseGrader
from harmony_core.rpc.tracebacks import place_of, summary
from harmony_core.text.threads import StringThread


async def score_or_refuse(grader: BaseGrader[Any], sample: StringThread) -> float:
    """The grader's score of the thread.

    Raises IgnoreGradeException when the grader does, GradeFailed for anything else that it raises and for a score that
    is no finite number, EngineError as it is.
    """
    try:
        score = float(await grader.score_float_value(sample))
    except (EngineError, IgnoreGradeException):
        raise
    except Exception as error:  # a grader is foreign code: its failure is its sample's
        place = place_of(error)
        what = summary(error) + (f" ({place})" if place else "")
        raise GradeFailed(f"grader {grader.grader_key!r} raised {what}", grader=grader.grader_key) from error
    if not math.isfinite(score):
        raise GradeFailed(f"grader {grader.grader_key!r} gave the score {score}", grader=grader.grader_key)
    return score
