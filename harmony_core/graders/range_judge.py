"""A judge whose score is the expected value of an integer, over what the model believes of each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, Field, create_model

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import UsageError
from harmony_core.graders.judges import DATA, Judge, PromptBuildingBlocks, block
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel


class ReasonedScore(BaseModel):
    """A whole number with its reason."""

    reasoning: str = Field(description="the reason for the score, in a sentence")
    score: int = Field(description="the score, a whole number")


class EvaluationSteps(BaseModel):
    """What to look at, in order."""

    steps: list[str] = Field(description="short steps, in order", min_length=1, max_length=4)


class SubrangeExpectations(NamedTuple):
    """What the scores from the first to the second of `subrange`, both included, mean."""

    subrange: tuple[int, int]
    expectation: str


class RangeJudgeShot(NamedTuple):
    """A sample with the score that a judge should give."""

    thread: StringThread
    reasoning: str
    score: int


class RangeJudgeGrader(Judge):
    """The expected score of a completion, from `score_range[0]` to `score_range[1]`, or 0 to 1 if it is normalised.

    The model first reasons. Each integer of the range is then the whole answer to a prompt with this reasoning, and
    its weight is the probability of that answer, its end included, among all of them: the score is the sum of p * s.
    Without `evaluation_steps` the model writes them once. Raises UsageError for a model that is not of the registry.
    """

    evaluation_steps: Sequence[str] | None = None
    """What the model is told to look at, in order; settable. None until the model has written them."""

    @checked
    def __init__(
        self,
        grader_key: str,
        model: InferenceModel,
        criteria: str,
        score_range: tuple[int, int] = (1, 5),
        evaluation_steps: Sequence[str] | None = None,
        subrange_expectations: Sequence[SubrangeExpectations] | None = None,
        shots: Sequence[RangeJudgeShot] | None = None,
        normalize_score: bool = True,
    ) -> None:
        super().__init__(grader_key, model)
        if not self.is_local:
            raise UsageError(
                f"{self.model_path} gives no log-probs, which a range judge reads", hint="name a model of the registry"
            )
        if score_range[0] >= score_range[1]:
            raise UsageError(f"score_range must go up, not from {score_range[0]} to {score_range[1]}")
        if shots and evaluation_steps is None:
            raise UsageError("shots show evaluation steps at work: give evaluation_steps, too")
        self.criteria, self.score_range, self.shots = criteria, tuple(score_range), list(shots or ())
        self._normalize, self.evaluation_steps = normalize_score, evaluation_steps
        self._expectations = "\n".join(f"{low} to {high}: {text}" for (low, high), text in subrange_expectations or ())
        self._writing_steps = asyncio.Lock()
        low, high = self.score_range
        kind = Annotated[int, Field(ge=low, le=high, description="the score")]
        self._output = create_model("ReasonedScore", __base__=ReasonedScore, score=(kind, ...))
        self._system = f"Score the completion from {low} (worst) to {high} (best) by the criterion. {DATA}"

    @property
    def str_evaluation_steps(self) -> str | None:
        """The steps as numbered lines."""
        steps = self.evaluation_steps
        return None if steps is None else "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))

    async def generate_evaluation_steps(self) -> list[str]:
        """Steps that the model derives from the criteria, at temperature 0."""
        asked = 'List short steps to judge a completion by the criterion. Answer in JSON: {"steps": [text, ...]}'
        prompt = StringThread([("system", asked), ("user", block("criterion", self.criteria))])
        return (await self.ask(prompt, EvaluationSteps)).steps

    async def judge(self, sample: StringThread) -> tuple[float, str]:
        """The expected score and the model's reasoning."""
        async with self._writing_steps:
            if self.evaluation_steps is None:
                self.evaluation_steps = await self.generate_evaluation_steps()
        reasoned = f'{self._system} Answer in JSON: {{"reasoning": why, in a sentence, "score": whole number}}'
        prompt = StringThread([("system", reasoned)])
        for shot in self.shots:
            verdict = ReasonedScore(reasoning=shot.reasoning, score=shot.score)
            prompt = prompt.user(self._shown(shot.thread)).assistant(verdict.model_dump_json())
        reasoning = (await self.ask(prompt.user(self._shown(sample)), self._output)).reasoning
        logprobs = await self.score_logprobs(sample, reasoning)
        most = max(logprobs.values())
        weights = {score: math.exp(logprob - most) for score, logprob in logprobs.items()}
        value = sum(score * weight for score, weight in weights.items()) / sum(weights.values())
        low, high = self.score_range
        return (value - low) / (high - low) if self._normalize else value, reasoning

    async def score_logprobs(self, sample: StringThread, reasoning: str) -> dict[int, float]:
        """The log-prob of each score as the whole answer, with the token that ends it, after the prompt that asks."""
        prompt = StringThread([("system", f"{self._system} Answer with the whole number alone.")])
        for shot in self.shots:
            prompt = prompt.user(self._shown(shot.thread, shot.reasoning)).assistant(str(shot.score))
        prompt = await self.without_control_tokens(prompt.user(self._shown(sample, reasoning)))
        scores = range(self.score_range[0], self.score_range[1] + 1)
        turns = prompt.get_turns()
        answers = [StringThread([*turns, ("assistant", str(score))]) for score in scores]
        async with self._slots:  # together, so that they are packed into one pass
            return dict(zip(scores, await asyncio.gather(*map(self.model.logprobs, answers)), strict=True))

    def _shown(self, sample: StringThread, reasoning: str = "") -> str:
        others = {"steps": self.str_evaluation_steps or "", "expectations": self._expectations}
        shown = PromptBuildingBlocks.of(sample)
        return shown.written(criterion=self.criteria, **others) + (reasoning and "\n" + block("reasoning", reasoning))
