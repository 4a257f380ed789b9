"""Recording what a training class was constructed with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from harmony_core.loggers import Logger


class Logging(Protocol):
    """An object with a logger."""

    logger: Logger


S = TypeVar("S", bound=Logging)
P = ParamSpec("P")


def logs_arguments(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Have a constructor give its plain arguments, defaults included, to `self.logger.log_config` once it is done.

    Numbers, text and schedules are plain; of a dataset the size is recorded.
    """
    signature = inspect.signature(init)

    def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        config: dict[str, Any] = {"algorithm": type(self).__name__, "samples": len(bound.arguments["dataset"])}
        for name, value in bound.arguments.items():
            if isinstance(value, bool | int | float | str) or name.startswith("lr_scheduler"):
                config[name] = value
        self.logger.log_config(config)

    update_wrapper(construct, init)
    return construct
