"""Recording what a training class was constructed with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from harmony_core.errors import UsageError
from harmony_core.journal import running_job
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier, StdoutJobNotifier


class Configured(Protocol):
    """A training class: it has a logger, and settings that decide its steps."""

    logger: Logger
    settings: dict[str, Any]


S = TypeVar("S", bound=Configured)
P = ParamSpec("P")


def keeps_settings(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Keep a constructor's plain arguments, defaults included, as `self.settings`, and log them once it is done.

    Numbers, text, mappings and schedules are plain; what only concerns checkpoints is left out.
    """
    signature = inspect.signature(init)

    def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.settings = {
            name: value
            for name, value in bound.arguments.items()
            if not name.startswith("checkpoint_")
            and (isinstance(value, bool | int | float | str | Mapping) or name.startswith("lr_scheduler"))
        }
        init(self, *args, **kwargs)
        described = {"algorithm": type(self).__name__, "samples": len(bound.arguments["dataset"])}
        self.logger.log_config(described | self.settings)

    update_wrapper(construct, init)
    return construct


def stage_of(given: StageNotifier | None, name: str) -> StageNotifier:
    """A training class's stage: the given one, else one of the run's job, so that it is saved and can be resumed."""
    return given or (running_job() or StdoutJobNotifier()).stage_notifier(name)


def check_loss_options(train: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise UsageError for keywords that a model's loss does not take: before the first rollout, not after it."""
    parameters = inspect.signature(train).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            taken = ", ".join(known) or "none"
            raise UsageError(f"loss_options: {train.__name__} takes no {name!r}", hint=f"it takes: {taken}")
