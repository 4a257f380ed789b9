"""A judge that says whether a completion meets a criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, Field

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import IgnoreGradeException
from harmony_core.graders.base import FailedJudgeLog, SuccessJudgeLog
from harmony_core.graders.judges import DATA, Judge, PromptBuildingBlocks
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel

SYSTEM = (
    f"Does the completion meet the criterion? {DATA} "
    'Answer in JSON: {"reasoning": why, in a sentence, "score": "PASS", "FAIL", or "NA" if it does not apply}'
)


class ScoresMap(TypedDict):
    """The values of verdicts."""

    PASS: float
    FAIL: float


class BaseTemplatedPromptJudgeOutput(BaseModel):
    """The verdict of a templated judge; a subclass has the fields and says what they are worth."""

    def get_score(self) -> float:
        """The value of the grade."""
        raise NotImplementedError(f"{type(self).__name__} has no get_score")

    def get_reasoning(self) -> str | None:
        """The reason of the grade."""
        raise NotImplementedError(f"{type(self).__name__} has no get_reasoning")


class _Reasoned(BaseTemplatedPromptJudgeOutput):
    reasoning: str = Field(description="the reason for the score, in a sentence")

    def get_reasoning(self) -> str:
        """The reason."""
        return self.reasoning


class SimpleReasonedFloatOutput(_Reasoned):
    """A number with its reason."""

    score: float = Field(description="the score")

    def get_score(self) -> float:
        """The score."""
        return self.score


class BinaryJudgeOutput(_Reasoned):
    """PASS, FAIL or NA, with the reason."""

    SCORES_MAP: ClassVar[ScoresMap] = {"PASS": 1.0, "FAIL": 0.0}
    score: Literal["PASS", "FAIL", "NA"] = Field(description="PASS, FAIL, or NA if the criterion does not apply")

    def get_score(self) -> float:
        """1 for PASS, 0 for FAIL. Raises IgnoreGradeException for NA."""
        if self.score == "NA":
            raise IgnoreGradeException(f"the criterion does not apply: {self.reasoning}")
        return self.SCORES_MAP[self.score]


class BinaryJudgeShot(NamedTuple):
    """A sample with the verdict that a judge should give; `criteria` replaces the judge's own for this sample."""

    thread: StringThread
    reasoning: str | None
    score: Literal["PASS", "FAIL", "NA"]
    criteria: str | None = None


_SKY = StringThread([("user", "What colour is a clear sky?"), ("assistant", "Blue.")])
DEFAULT_SHOTS = (
    BinaryJudgeShot(_SKY, "The answer is one word.", "PASS", "The answer has at most three words."),
    BinaryJudgeShot(_SKY, "The answer names no animal.", "FAIL", "The answer names an animal."),
)
"""What a judge is shown if it is given no shots and its context has at least `LEAST_CONTEXT` tokens."""
LEAST_CONTEXT = 1024


class BinaryJudgeGrader(Judge):
    """1 if the completion meets the criteria, 0 if not; a verdict of NA leaves the sample without a score."""

    shots: Sequence[BinaryJudgeShot] = ()
    """The samples with verdicts that the judge is shown; settable."""

    @checked
    def __init__(
        self,
        grader_key: str,
        model: InferenceModel,
        criteria: str,
        shots: Sequence[BinaryJudgeShot] | None = None,
        temperature: float = 0.0,
        grader_id: str | None = None,
    ) -> None:
        super().__init__(grader_key, model, temperature, grader_id)
        self.criteria = criteria
        short = model.get_builder_args().get("max_seqlen", LEAST_CONTEXT) < LEAST_CONTEXT
        self.shots = list(shots if shots is not None else () if short else DEFAULT_SHOTS)

    def add_log(self, log: SuccessJudgeLog | FailedJudgeLog) -> None:
        """As of every grader, with the documented name of the argument."""
        super().add_log(log)

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The verdict's value and its reason."""
        prompt = StringThread([("system", SYSTEM)])
        for shot in self.shots:
            verdict = BinaryJudgeOutput(reasoning=shot.reasoning or "", score=shot.score)
            prompt = prompt.user(self._shown(shot.thread, shot.criteria)).assistant(verdict.model_dump_json())
        verdict = await self.ask(prompt.user(self._shown(sample)), BinaryJudgeOutput)
        return verdict.get_score(), verdict.reasoning

    def _shown(self, sample: StringThread, criteria: str | None = None) -> str:
        return PromptBuildingBlocks.of(sample).written(criterion=criteria or self.criteria)
