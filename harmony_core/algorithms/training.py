"""What all training classes have: settings that are kept, methods that a subclass may override, one loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial, update_wrapper
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

from harmony_core.algorithms.batch_loader import BatchLoader, settle
from harmony_core.algorithms.callbacks import outcome_of
from harmony_core.algorithms.loop import StepLoop
from harmony_core.algorithms.schedulers import Scheduler
from harmony_core.config.argument_kinds import check_arguments
from harmony_core.errors import NothingToTrain, UsageError
from harmony_core.journal import current, phase
from harmony_core.loggers import Logger, logger_of_training
from harmony_core.notifiers import StageNotifier, StdoutJobNotifier

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

log = logging.getLogger(__name__)

OURS = "harmony_core."

A = TypeVar("A")
B = TypeVar("B")


class Training:
    """Takes a step for each batch of the feed, with a reference model where there is one.

    `_hooks`: the methods that a subclass may override. A training class calls each of them with one argument.
    """

    _hooks: ClassVar[tuple[str, ...]] = ()
    settings: dict[str, Any]
    default_settings: dict[str, Any]
    model: TrainingModel
    logger: Logger
    stage_notifier: StageNotifier
    feed: BatchLoader[Any]
    loop: StepLoop
    lr_schedule: Scheduler
    max_grad_norm: float
    skip_nan_gradients: bool
    weight_decay: float = 0.0
    reference: InferenceModel | None = None
    _last_turn: asyncio.Future[None] | None = None

    @property
    def training_completion_percentage(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.feed.completion

    async def run(self) -> dict[str, float]:
        """Train to the end, in a resumed run from the checkpoint. Returns the last step's numbers.

        Raises TooManyFailures, and UsageError for a checkpoint of another training.
        """
        metrics = await self.loop.run(self._step, self._prepare)
        if self.reference is not None:
            await self.reference.dealloc()
        return metrics

    async def _prepare(self) -> None:
        """What comes before the first step, and before weights are restored."""

    async def _step(self) -> dict[str, Any]:
        raise NotImplementedError

    def _log_to(self, logger: Logger | None, stage_notifier: StageNotifier | None, stage: str) -> None:
        """Take what was given, or else what the run has: a stage of its job is saved and can be resumed."""
        self.logger = logger_of_training(logger)
        self.stage_notifier = stage_notifier or (current().job or StdoutJobNotifier()).stage_notifier(stage)

    async def _train_next(
        self, train: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Train the feed's next batch and step. Returns what `train` returned, and the metrics of batch and step.

        The end of the data may hold dropped samples only: there is no step to take then.
        """
        with phase("training"):
            batch = await self.feed.next_batch(train)
        return batch.results, batch.metrics | (await self._optim_step() if batch.results else {})

    async def _optim_step(self) -> dict[str, float]:
        lr = self.lr_schedule(self.feed.completion)
        with phase("optimizer"):
            return await step_if_any(
                self.model.optim_step(lr, self.weight_decay, self.max_grad_norm, self.skip_nan_gradients)
            )

    async def _in_turn(self, first: Awaitable[A], then: Callable[[A], Awaitable[B]]) -> B:
        """`then` of what `first` gives, once the `then` of every earlier call has ended, or its `first` has failed.

        So samples are scored at once and trained in order, and every run packs them alike.
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
    """Keep a constructor's plain arguments, defaults included, as `self.settings`, and log them once it is done.

    `self.default_settings`: their defaults, `inspect.Parameter.empty` where there is none.

    Arguments of another kind than annotated are refused. Numbers, text, mappings and schedules are plain; what only
    concerns checkpoints is left out, and `max_failure_rate`, which changes no step. Raises UsageError for methods of a
    subclass that would never be called.
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
        init(self, *args, **kwargs)
        described = {"algorithm": type(self).__name__, "samples": len(bound.arguments["dataset"])}
        self.logger.log_config(described | self.settings)

    update_wrapper(construct, init)
    return construct


def check_overrides(training: Training) -> None:
    """Raise UsageError for a method of a subclass that its training class would never call, or could not call."""
    lineage = type(training).__mro__
    ours = [cls for cls in lineage if issubclass(cls, Training) and cls.__module__.startswith(OURS)]
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
    """Those of a class and of all below it: the hook of another class is a likely mistake."""
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
    """Raise UsageError for keywords that a model's loss does not take: before the first rollout, not after it."""
    parameters = inspect.signature(train).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            taken = ", ".join(known) or "none"
            raise UsageError(f"loss_options: {train.__name__} takes no {name!r}", hint=f"it takes: {taken}")


def each(hook: Callable[[Any], Any]) -> Callable[[Sequence[Any]], Awaitable[list[Any]]]:
    """For a batch: the outcome of a method that a subclass may override, of each sample."""
    return partial(settle, lambda sample: outcome_of(hook(sample)))


def means(prefix: str, measured: Sequence[Any]) -> dict[str, float]:
    """The mean of each number in the dictionaries that a hook returned, over the samples that have it."""
    found: dict[str, list[float]] = {}
    for numbers in measured:
        for name, value in (numbers if isinstance(numbers, dict) else {}).items():
            if isinstance(value, int | float):
                found.setdefault(f"{prefix}/{name}", []).append(value)
    return {name: fmean(values) for name, values in found.items()}


async def step_if_any(step: Awaitable[dict[str, float]]) -> dict[str, float]:
    """An optimizer step's metrics; none, with a warning, when a subclass's methods trained no sample for it."""
    try:
        return await step
    except NothingToTrain as error:
        log.warning("a step is left out: %s", error.message)
        return {}
