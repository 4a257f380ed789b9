"""Callbacks that look at a model while it is trained: samples, validation loss, grades; and one that saves it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.feeding import Unusable, in_words, settle
from harmony_core.algorithms.rollout import prompt_of
from harmony_core.errors import DataError, NothingToTrain
from harmony_core.graders import BaseGrader, score_or_refuse
from harmony_core.logging_table import Table
from harmony_core.mapping import async_map
from harmony_core.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

log = logging.getLogger(__name__)


class GenerateSamplesCallback(RecipeCallback):
    """Logs completions of some prompts as the table `generation/<log_key>` (system, prompt, response).

    Beside it `generation/generation_length_mean` and `_std` in tokens, and `generation/num_samples`. A thread's last
    assistant turn is left out before generating. A thread that cannot be answered is left out and counted under
    `generation/dropped/<reason>`.
    """

    def __init__(
        self, thread_set: Sequence[StringThread], model: InferenceModel, frequency: float, log_key: str = "samples"
    ) -> None:
        super().__init__(frequency, log_key_prefix="generation")
        self.prompts = [prompt_of(thread) for thread in thread_set]
        self.model = model
        self.log_key = log_key

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Generate one completion for each prompt."""
        outcomes = await settle(self.model.generate_tokens, self.prompts)
        threads = [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
        table = Table(["system", "prompt", "response"])
        for thread in await async_map(self.model.detokenize_thread, threads):
            turns = thread.messages()
            system = "\n".join(content for role, content in turns if role == "system")
            others = [(role, content) for role, content in turns if role != "system"]
            # One question needs no label; of a longer conversation every turn has its role.
            prompt = others[0][1] if len(others) == 1 else "\n".join(f"[{role}] {text}" for role, text in others)
            table.add_row([system, prompt, thread.completion() or ""])
        lengths = _lengths([thread.len_last_turn() for thread in threads])
        return {self.log_key: table, **lengths, "num_samples": len(threads), **_dropped(outcomes)}


class ValidationLossCallback(RecipeCallback):
    """Logs `validation/<log_key>`: the mean over samples of each one's mean -logprob over weighted tokens.

    A sample that is too long, has no weighted token or cannot be tokenized is left out and counted under
    `validation/dropped/<reason>`. Raises DataError when none is left.
    """

    def __init__(
        self,
        validation_set: Sequence[StringThread],
        model: InferenceModel,
        frequency: float = 0.1,
        log_key: str = "loss",
    ) -> None:
        super().__init__(frequency, log_key_prefix="validation")
        self.validation_set = validation_set
        self.model = model
        self.log_key = log_key

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Score every sample."""
        outcomes = await settle(self._loss, self.validation_set)
        losses = [outcome for outcome in outcomes if isinstance(outcome, float)]
        if not losses:
            raise DataError(f"no validation sample can be scored: {in_words(_reasons(outcomes)) or 'there is none'}")
        return {self.log_key: fmean(losses), **_dropped(outcomes)}

    async def _loss(self, thread: StringThread) -> float:
        tokenized = await self.model.tokenize_thread(thread)
        _, _, weights = await self.model.serialize_tokenized_thread(tokenized)
        weights = [weight for weight in weights[1:] if weight > 0]
        if not weights:
            raise NothingToTrain("the sample has no weighted token")
        logprobs = await self.model.logprobs_per_token(tokenized)
        return -sum(w * x for w, x in zip(weights, logprobs, strict=True)) / sum(weights)


class GraderEvalCallback(RecipeCallback):
    """Has a grader score one completion for each prompt, greedy unless `temperature` says otherwise.

    Logs the grader's logs as `<log_key>/rewards/*`, `<log_key>/score_mean`, `<log_key>/generation_length_mean` and
    `_std` in tokens, and `<log_key>/num_samples`, the number graded. Samples that could not be answered or graded are
    left out and counted under `<log_key>/dropped/<reason>`. A thread's last assistant turn is left out before
    generating. With `clear_grader_logs` the grader's logs are cleared before and after, so that grades of training
    and of evaluation do not mix.
    """

    def __init__(
        self,
        validation_set: Sequence[StringThread],
        model: InferenceModel,
        grader: BaseGrader[Any],
        frequency: float,
        log_key: str = "validation",
        clear_grader_logs: bool = True,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(frequency, log_key_prefix=log_key)
        self.prompts = [prompt_of(thread) for thread in validation_set]
        self.model = model.temperature(temperature)
        self.grader = grader
        self.clear_grader_logs = clear_grader_logs

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Generate and grade one completion for each prompt."""
        if self.clear_grader_logs:
            self.grader.clear_logs()
        outcomes = await settle(self._grade, self.prompts)
        graded = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
        rewards = {f"rewards/{key}": value for key, value in self.grader.get_logs(self.clear_grader_logs).items()}
        mean = {"score_mean": fmean(score for score, _ in graded)} if graded else {}
        lengths = _lengths([length for _, length in graded])
        return {**rewards, **mean, **lengths, "num_samples": len(graded), **_dropped(outcomes)}

    async def _grade(self, prompt: StringThread) -> tuple[float, int]:
        tokens = await self.model.generate_tokens(prompt)
        answer = await self.model.detokenize_thread(tokens)
        return await score_or_refuse(self.grader, answer), tokens.len_last_turn()


class CheckpointCallback(RecipeCallback):
    """Saves the model as `<checkpoint_name>-<fraction of the run>`, at neither end of the run."""

    def __init__(self, model: TrainingModel, checkpoint_name: str, frequency: float = 0.2) -> None:
        super().__init__(frequency, force_run_on_exit=False)
        self.model = model
        self.checkpoint_name = checkpoint_name

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Save, and log the exact reference."""
        if not 0 < current_percentage < 1:
            return {}
        return {"checkpoint": await self.model.save(f"{self.checkpoint_name}-{round(current_percentage, 3)}")}


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {"generation_length_mean": fmean(lengths), "generation_length_std": pstdev(lengths)}


def _reasons(outcomes: Sequence[object]) -> Counter[str]:
    return Counter(outcome.code for outcome in outcomes if isinstance(outcome, Unusable))


def _dropped(outcomes: Sequence[object]) -> dict[str, int]:
    reasons = _reasons(outcomes)
    if reasons:
        log.warning("%d of %d samples left out: %s", reasons.total(), len(outcomes), in_words(reasons))
    return {f"dropped/{reason}": count for reason, count in reasons.items()}
