"""The base of all training classes: settings, overridable methods, learning-rate schedules, and the loop of steps."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

from harmony_core.algorithms.batch_loader import BatchLoader, in_words, settle, too_many_failures
from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks, result_of
from harmony_core.algorithms.checkpointing import Checkpointing
from harmony_core.config.argument_kinds import check_arguments
from harmony_core.errors import NothingToTrain, UsageError
from harmony_core.journal import current, phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.notifiers import StageNotifier, StdoutJobNotifier
from harmony_core.text.row_lengths import Rows
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel
    from harmony_core.client.live import RowGauge

log = logging.getLogger(__name__)

Scheduler = Callable[[float], float]
"""A function from the completed fraction of the run to the learning rate."""


@dataclass(frozen=True)
class CosineSchedulerWithoutWarmup:
    """Half a cosine from `lr` at 0 down to `lr / decay_factor` at 1, constant afterwards."""

    lr: float = 1e-5
    decay_factor: float = 10.0

    def __post_init__(self) -> None:
        if self.decay_factor <= 0:
            raise UsageError(f"decay_factor must be above 0, got {self.decay_factor}")

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate at this fraction of the run."""
        lowest = self.lr / self.decay_factor
        return lowest + 0.5 * (1.0 + math.cos(math.pi * min(completion_percentage, 1.0))) * (self.lr - lowest)


@dataclass(frozen=True)
class CombinedSchedule:
    """`a` over the run's first `change_point`, then `b` over the rest; each gets its own part as 0 to 1."""

    a: Scheduler
    b: Scheduler
    change_point: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.change_point <= 1.0:
            raise UsageError(f"change_point must lie between 0 and 1, got {self.change_point}")

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate at this fraction of the run."""
        # With a change point of 1 `b` has no part: the end still belongs to `a`.
        if completion_percentage < self.change_point or self.change_point == 1.0:
            return self.a(completion_percentage / self.change_point)
        return self.b((completion_percentage - self.change_point) / (1.0 - self.change_point))


@dataclass(frozen=True)
class CosineScheduler:
    """Linear warm-up from 0 to `lr` over `warmup_percentage` of the run, then a cosine to `lr / decay_factor`."""

    lr: float = 1e-5
    warmup_percentage: float = 0.1
    decay_factor: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_percentage <= 1.0:
            raise UsageError(f"warmup_percentage must lie between 0 and 1, got {self.warmup_percentage}")
        CosineSchedulerWithoutWarmup(self.lr, self.decay_factor)

    def __call__(self, completion_percentage: float) -> float:
        """The learning rate at this fraction of the run."""
        decay = CosineSchedulerWithoutWarmup(self.lr, self.decay_factor)
        return CombinedSchedule(lambda x: x * self.lr, decay, self.warmup_percentage)(completion_percentage)


class StepLoop:
    """Takes the steps of a training class until its batch loader is done; a resumed run starts at its checkpoint.

    A checkpoint holds the state of `models`, and is compared with their roles, the owner's `settings` and the name
    `algorithm`; see `Checkpointing`. `prompts`: whether samples are prompts, which the first model answers.
    """

    def __init__(
        self,
        owner: Training,
        algorithm: str,
        models: Mapping[str, TrainingModel],
        dataset: Sequence[Any],
        callbacks: Sequence[RecipeCallback],
        checkpoint_frequency: float = 0.2,
        checkpoint_restore_data: Mapping[str, Any] | None = None,
        prompts: bool = False,
    ) -> None:
        self.loader, self.logger, self.stage_notifier = owner.loader, owner.logger, owner.stage_notifier
        self.rows = rows_of(self.stage_notifier.stage_name, models.values(), self.loader.dataset.threads, prompts)
        if self.rows is not None and (planned := current().rows) is not None:
            planned.trained.append(self.rows)
        self.callbacks = callbacks
        self.checkpointing = Checkpointing(
            algorithm,
            self.stage_notifier,
            models=models,
            parts={"feed": self.loader, "logger": self.logger, "loop": self},
            samples=dataset,
            settings=owner.settings,
            defaults=owner.default_settings,
            callbacks=callbacks,
            frequency=checkpoint_frequency,
            restore_data=checkpoint_restore_data,
        )
        self._metrics: dict[str, float] = {}
        self._steps = 0
        self._shown: set[int] = set()

    @property
    def step(self) -> int:
        """The number of the current step, from 1: the logger's count, or the loop's if the logger does not count."""
        return max(self.logger.step, self._steps) + 1

    def shows(self) -> bool:
        """Whether samples go into the run's report now, which happens once in each tenth of the run."""
        tenth = int(self.loader.completion * 10)
        due = tenth not in self._shown
        self._shown.add(tenth)
        return due

    def get_state(self) -> dict[str, Any]:
        """The last step's metrics, for a checkpoint."""
        return {"metrics": self._metrics}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called."""
        self._metrics = dict(state["metrics"])

    async def run(
        self, take_step: Callable[[], Awaitable[dict[str, Any]]], prepare: Callable[[], Awaitable[None]]
    ) -> dict[str, float]:
        """Call `take_step`, which trains the next batch, until the loader is done. Returns the last step's metrics.

        Callbacks run before the first step and after each step, even if an earlier run has called them at its end.
        `prepare` runs before weights are restored.
        """
        for callback in self.callbacks:
            callback.last_call = -1.0
        return await self.checkpointing.run(lambda: self._run(take_step), prepare)

    async def _run(self, take_step: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, float]:
        loader = self.loader
        if self.rows is not None:
            await check_first_rows(self.rows, loader)
        if logs := await invoke_callbacks(self.callbacks, loader.completion):
            self.logger(logs)
        self.stage_notifier.report_progress(loader.total, loader.taken)
        while loader.taken < loader.total:
            step = await take_step()
            self._steps += 1
            logs = await invoke_callbacks(self.callbacks, loader.completion)
            self.logger({**step, **logs, "completion_percentage": loader.completion})
            # Added to the earlier counts: a last batch that only has dropped samples takes no step.
            self._metrics |= {name: value for name, value in step.items() if isinstance(value, int | float)}
            self.stage_notifier.report_progress(loader.total, loader.taken)
            if await self.checkpointing.step_done(loader.completion):
                break
        if loader.dropped:
            log.warning("dropped %d of %d samples: %s", loader.dropped.total(), loader.total, in_words(loader.dropped))
        return {**self._metrics, "completion_percentage": loader.completion}


def rows_of(name: str, models: Iterable[TrainingModel], rows: Sequence[Any], prompts: bool) -> Rows | None:
    """The dataset of a class that trains `models`; None if the length of a row is unknown.

    It is unknown for rows of a subclass's own type, for models of other classes, and without a tokenizer.
    """
    parts = rows[0] if isinstance(rows[0], tuple) else [rows[0]]
    gauges: list[RowGauge] = [gauge for model in models if (gauge := getattr(model, "row_gauge", None)) is not None]
    if not gauges or not all(isinstance(part, StringThread) for part in parts):
        return None
    return gauges[0].rows(name, rows, prompts, gauges[1:])


async def check_first_rows(rows: Rows, loader: BatchLoader[Any]) -> None:
    """Raise TooManyFailures if more of a run's first rows will be refused than `max_failure_rate` allows."""
    first = loader.first_rows()
    errors = [error for _, error in (await asyncio.to_thread(rows.checked, first)).errors]
    if len(errors) > loader.max_failure_rate * len(first):
        reasons = Counter(error.code for error in errors)
        raise too_many_failures(reasons, f"first {len(first)}", loader.max_failure_rate, errors[-1]) from errors[-1]


A = TypeVar("A")
B = TypeVar("B")


class Training:
    """Base of the training classes: one step for each batch of the loader, until it is done.

    The plain arguments of a constructor become attributes of the same names (`keeps_settings`). A class calls each
    method named in `_hooks` with one argument; a subclass may override these methods.
    """

    _hooks: ClassVar[tuple[str, ...]] = ()
    settings: dict[str, Any]
    default_settings: dict[str, Any]
    model: TrainingModel
    logger: Logger
    stage_notifier: StageNotifier
    loader: BatchLoader[Any]
    loop: StepLoop
    lr_schedule: Scheduler
    max_grad_norm: float
    skip_nan_gradients: bool
    data_seed: int
    kl_beta: float
    use_tangents: bool
    weight_decay: float = 0.0
    reference: InferenceModel | None = None
    _last_turn: asyncio.Future[None] | None = None

    @property
    def training_completion_percentage(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.loader.completion

    async def run(self) -> dict[str, float]:
        """Train to the end; a resumed run starts at its checkpoint. Returns the last step's metrics.

        Raises TooManyFailures, and UsageError if the checkpoint belongs to another training.
        """
        metrics = await self.loop.run(self._step, self._prepare)
        if self.reference is not None:
            await self.reference.dealloc()
        return metrics

    async def _prepare(self) -> None:
        """Called before the first step, and before weights are restored."""

    async def _step(self) -> dict[str, Any]:
        raise NotImplementedError

    def _log_to(self, logger: Logger | None, stage_notifier: StageNotifier | None, stage: str) -> None:
        """Use the given logger and notifier, or else the run's: a stage of its job is saved and can be resumed."""
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_notifier or (current().job or StdoutJobNotifier()).stage_notifier(stage)

    async def _train_next(
        self, train: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Train the next batch and take a step. Returns the results of `train`, and the metrics of batch and step.

        No step is taken if the end of the data only has dropped samples.
        """
        with phase("training"):
            results, metrics = await self.loader.next_batch(train)
        if results:
            metrics |= await self._optim_step(self.model, self.lr_schedule, self.weight_decay)
        return results, metrics

    async def _optim_step(self, model: TrainingModel, schedule: Scheduler, weight_decay: float) -> dict[str, float]:
        """The metrics of a step; {} with a warning if a subclass's methods trained no sample for it."""
        try:
            with phase("optimizer"):
                lr = schedule(self.loader.completion)
                return await model.optim_step(lr, weight_decay, self.max_grad_norm, self.skip_nan_gradients)
        except NothingToTrain as error:
            log.warning("a step is left out: %s", error.message)
            return {}

    async def _in_turn(self, first: Awaitable[A], then: Callable[[A], Awaitable[B]]) -> B:
        """Await `first`, then call `then` with its result after every earlier call has ended its `then`, or failed.

        Samples are thus scored at once and trained in order, so that every run packs them alike.
        """
        before, mine = self._last_turn, asyncio.get_running_loop().create_future()
        self._last_turn = mine
        try:
            found = await first
            if before is not None and not before.done():
                await asyncio.wait([before])
            return await then(found)
        finally:
            if before is None or before.done():
                mine.set_result(None)
            else:
                before.add_done_callback(lambda _: mine.set_result(None))


S = TypeVar("S", bound=Training)
P = ParamSpec("P")


def keeps_settings(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Keep a constructor's plain arguments, with defaults, as `self.settings` and as attributes, and log them.

    Their defaults are `self.default_settings`. Arguments of another type than annotated are refused. Numbers, text,
    mappings and schedules are plain; arguments for checkpoints and `max_failure_rate`, which do not change steps, are
    left out. Raises UsageError for methods of a subclass that would never be called.
    """
    signature = inspect.signature(init)

    def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        check_overrides(self)
        check_arguments(init, (self, *args), kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.settings = {
            name: value
            for name, value in bound.arguments.items()
            if not name.startswith("checkpoint_")
            and name != "max_failure_rate"
            and (isinstance(value, bool | int | float | str | Mapping) or name.startswith("lr_scheduler"))
        }
        self.default_settings = {name: signature.parameters[name].default for name in self.settings}
        vars(self).update(self.settings)
        init(self, *args, **kwargs)
        described = {"algorithm": type(self).__name__, "samples": len(bound.arguments["dataset"])}
        self.logger.log_config(described | self.settings)

    update_wrapper(construct, init)
    return construct


def check_overrides(training: Training) -> None:
    """Raise UsageError for a method of a subclass that its training class never calls, or cannot call."""
    lineage = type(training).__mro__
    ours = [cls for cls in lineage if issubclass(cls, Training) and cls.__module__.startswith("harmony_core.")]
    hooks = ours[0]._hooks
    methods = {
        name for cls in ours for name, value in vars(cls).items() if callable(value) or isinstance(value, property)
    }
    public = {name for name in methods if not name.startswith("_")}
    never = (public | _all_hooks(Training)) - {"run", *hooks}
    called = f"it calls {', '.join(hooks)}" if hooks else "pass callbacks=, or write a loop of your own"
    for cls in lineage[: lineage.index(ours[0])]:
        for name in vars(cls):
            if name in never:
                raise UsageError(f"{cls.__name__} overrides {name}, which {ours[0].__name__} never calls", hint=called)
            if name in hooks:
                _check_callable(training, cls, name)


def _all_hooks(cls: type[Training]) -> set[str]:
    """The hooks of a class and of its subclasses: using another class's hook is a likely mistake."""
    return {*cls._hooks}.union(*map(_all_hooks, cls.__subclasses__()))


def _check_callable(training: Training, cls: type, name: str) -> None:
    hook = getattr(training, name)
    problem = "" if callable(hook) else f"it is {hook!r}"
    if not problem:
        try:
            inspect.signature(hook).bind(None)
        except TypeError as error:
            problem = str(error)
    if problem:
        raise UsageError(
            f"{cls.__name__}.{name} cannot be called with one argument: {problem}",
            hint=f"def {name}(self, sample): ...",
        )


def check_loss_options(train: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise UsageError before the first rollout for keywords that a model's loss does not accept."""
    parameters = inspect.signature(train).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in (name for name in options if name not in known):
        taken = ", ".join(known) or "none"
        raise UsageError(f"loss_options: {train.__name__} takes no {name!r}", hint=f"it takes: {taken}")


def settle_each(hook: Callable[[Any], Any]) -> Callable[[Sequence[Any]], Awaitable[list[Any]]]:
    """A function that calls an overridable method on each sample of a batch, and returns results and errors."""
    return partial(settle, lambda sample: result_of(hook(sample)))


def means(prefix: str, measured: Sequence[Any]) -> dict[str, float]:
    """The mean of each number in the dictionaries that a hook returned, one or a list for each sample."""
    found: dict[str, list[float]] = {}
    for numbers in chain.from_iterable(one if isinstance(one, list) else [one] for one in measured):
        for name, value in (numbers if isinstance(numbers, dict) else {}).items():
            if isinstance(value, int | float):
                found.setdefault(f"{prefix}/{name}", []).append(value)
    return {name: fmean(values) for name, values in found.items()}
