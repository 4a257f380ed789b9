"""Callbacks of the training classes: generated samples, validation loss, grades, checkpoints, and your own."""

from __future__ import annotations

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import wraps
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.batch_loader import Unusable, async_map, in_words, settle
from harmony_core.config.argument_kinds import checked
from harmony_core.environments import EnvironmentFactory
from harmony_core.errors import DataError, NothingToTrain, UsageError
from harmony_core.graders import BaseGrader, score_or_refuse
from harmony_core.journal import phase
from harmony_core.loggers.base import Table
from harmony_core.request_seeds import looking
from harmony_core.text.threads import StringThread, stringify_thread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

log = logging.getLogger(__name__)


class RecipeCallback(ABC):
    """Runs at 0 %, each time the run passes a multiple of `frequency` (a fraction of the run), and at 100 %.

    Each multiple counts once, at the first report at or past it; with `force_run_on_exit` the end counts too. Requests
    of a callback to a model have their own random seeds, so that callbacks never change the training.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "callback" in vars(cls):
            cls.callback = _with_own_seeds(cls.callback)  # type: ignore[method-assign]

    @checked
    def __init__(self, frequency: float, force_run_on_exit: bool = True, log_key_prefix: str | None = None) -> None:
        if frequency <= 0:
            raise UsageError(f"a callback's frequency must be above 0, got {frequency}")
        self.frequency = frequency
        self.force_run_on_exit = force_run_on_exit
        self.log_key_prefix = log_key_prefix
        self.last_call = -1.0
        """The fraction of the run at the last call; negative before the first."""

    def _multiples(self, fraction: float) -> int:
        # Progress is a quotient such as 3 * 0.1: a multiple missed only by rounding counts as reached.
        return math.floor(fraction / self.frequency + 1e-9)

    def is_due(self, current_percentage: float) -> bool:
        """Whether the callback has to run when this fraction of the run is done."""
        if self.last_call < 0:
            return True
        if current_percentage >= 1.0 and self.force_run_on_exit:
            return self.last_call < 1.0
        return self._multiples(current_percentage) > self._multiples(self.last_call)

    async def maybe_call(self, current_percentage: float) -> dict[str, Any]:
        """Run the callback if it is due. Returns its metrics with its prefix."""
        if not self.is_due(current_percentage):
            return {}
        with phase("callbacks"):
            logs = await self.callback(current_percentage)
        self.last_call = current_percentage
        prefix = f"{self.log_key_prefix}/" if self.log_key_prefix else ""
        return {f"{prefix}{key}": value for key, value in logs.items()}

    @abstractmethod
    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Do the work. Returns metrics."""


async def invoke_callbacks(callbacks: Sequence[RecipeCallback], current_percentage: float) -> Mapping[str, Any]:
    """Run the callbacks that are due, in order. Returns their metrics, with the run's completion unless empty."""
    logs: dict[str, Any] = {}
    for number, callback in enumerate(callbacks):
        with looking(f"callback {number} at {current_percentage}"):
            logs |= await callback.maybe_call(current_percentage)
    if logs:
        logs["training/completion_percentage"] = logs["completion_percentage"] = current_percentage
    return logs


def prompt_of(thread: StringThread) -> StringThread:
    """The thread without a last assistant turn."""
    if thread.completion() is None:
        return thread
    return StringThread.from_turns(thread.turns[:-1], thread.metadata, thread.uuid(), thread.template_kwargs)


async def result_of(returned: Any) -> Any:
    """The result of a method of a recipe's own class, which may be a coroutine function or a plain function."""
    return await returned if inspect.isawaitable(returned) else returned


def _with_own_seeds(callback: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, dict[str, Any]]]:
    """Wrap a `callback` method so that its requests have their own random seeds."""

    @wraps(callback)
    async def work(self: RecipeCallback, current_percentage: float) -> dict[str, Any]:
        with looking(f"{type(self).__name__} at {current_percentage}"):
            found: dict[str, Any] = await result_of(callback(self, current_percentage))
            return found

    return work


class GenerateSamplesCallback(RecipeCallback):
    """Logs completions of some prompts as the table `generation/<log_key>` (system, prompt, response).

    Also logs `generation/generation_length_mean` and `_std` in tokens, and `generation/num_samples`. A thread's last
    assistant turn is removed before generating. A thread that cannot be answered is left out and counted under
    `generation/dropped/<reason>`.
    """

    @checked
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
            # A single question needs no label; in a longer conversation every turn is labelled with its role.
            prompt = others[0][1] if len(others) == 1 else "\n".join(f"[{role}] {text}" for role, text in others)
            table.add_row([system, prompt, thread.completion() or ""])
        lengths = _lengths([thread.len_last_turn() for thread in threads])
        return {self.log_key: table, **lengths, "num_samples": len(threads), **_dropped(outcomes)}


class ValidationLossCallback(RecipeCallback):
    """Logs `validation/<log_key>`: the mean over samples of each sample's mean -logprob over weighted tokens.

    A sample that is too long, has no weighted token or cannot be tokenized is left out and counted under
    `validation/dropped/<reason>`. Raises DataError when no sample is left.
    """

    @checked
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
        parts = await self.model.tokenize_parts(thread)
        weights = [weight for part in parts for weight in part.token_weights[1:] if weight > 0]
        if not weights:
            raise NothingToTrain("the sample has no weighted token")
        logprobs = [x for part in parts for x in await self.model.logprobs_per_token(part)]
        return -sum(w * x for w, x in zip(weights, logprobs, strict=True)) / sum(weights)


class GraderEvalCallback(RecipeCallback):
    """Grades one completion for each prompt, greedy unless `temperature` is set.

    Logs the grader's logs as `<log_key>/rewards/*`, `<log_key>/score_mean`, `<log_key>/generation_length_mean` and
    `_std` in tokens, and `<log_key>/num_samples`, the number graded. Samples that could not be answered or graded are
    left out and counted under `<log_key>/dropped/<reason>`. A thread's last assistant turn is removed before
    generating. With `clear_grader_logs` the grader's logs are cleared before and after, so that grades of training
    and evaluation do not mix.
    """

    @checked
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


class EnvironmentValidationCallback(RecipeCallback):
    """Plays one trajectory for each prompt in an environment, greedy unless `temperature` is set.

    Logs `<log_key>/score_mean` and `_std` of the trajectories' summed rewards, `num_turns_mean` and `_std`,
    and `num_samples`, and the environments' logs as `<log_key>/env/<key>`. Trajectories that fail are left out
    and counted under `<log_key>/dropped/<reason>`. `num_samples_log` of them go into the table `<log_key>/samples`.
    With `clear_env_logs` the factory's logs are cleared before and after, apart from those of the training.
    """

    @checked
    def __init__(
        self,
        validation_set: Sequence[StringThread],
        model: InferenceModel,
        env_factory: EnvironmentFactory,
        frequency: float,
        log_key: str = "validation",
        clear_env_logs: bool = True,
        temperature: float = 0.0,
        num_samples_log: int = 0,
    ) -> None:
        super().__init__(frequency, log_key_prefix=log_key)
        self.prompts = [prompt_of(thread) for thread in validation_set]
        self.model, self.env_factory = model.temperature(temperature), env_factory
        self.clear_env_logs, self.num_samples_log = clear_env_logs, num_samples_log

    async def generate_trajectory(self, initial_thread: StringThread) -> tuple[list[StringThread], float, int]:
        """The threads of one trajectory, its summed reward, and its number of turns."""
        threads, history = await self.env_factory.play(self.model, initial_thread)
        texts = await async_map(self.model.detokenize_thread, threads)
        return texts, history.get_cumulative_reward(), history.total_number_of_turns_generated

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Play and grade one trajectory for each prompt."""
        if self.clear_env_logs:
            self.env_factory.clear_logs()
        outcomes = await settle(self.generate_trajectory, self.prompts)
        played = [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
        logs: dict[str, Any] = {f"env/{k}": v for k, v in self.env_factory.get_logs(self.clear_env_logs).items()}
        for name, numbers in (("score", [s for _, s, _ in played]), ("num_turns", [float(n) for *_, n in played])):
            logs |= {f"{name}_mean": fmean(numbers), f"{name}_std": pstdev(numbers)} if numbers else {}
        if self.num_samples_log:
            shown = [["\n\n".join(map(stringify_thread, texts)), score] for texts, score, _ in played]
            logs["samples"] = Table(["trajectory", "score"]).add_rows(shown[: self.num_samples_log])
        return {**logs, "num_samples": len(played), **_dropped(outcomes)}


class CheckpointCallback(RecipeCallback):
    """Saves the model as `<checkpoint_name>-<fraction of the run>`, except at the beginning and end of the run."""

    @checked
    def __init__(self, model: TrainingModel, checkpoint_name: str, frequency: float = 0.2) -> None:
        super().__init__(frequency, force_run_on_exit=False)
        self.model = model
        self.checkpoint_name = checkpoint_name

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """Save the model, and log its exact reference."""
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
