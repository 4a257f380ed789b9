"""Small things that recipes do with functions, arguments and prompts (documented path `core.utils`)."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypedDict, TypeVar

from harmony_core.algorithms.checkpointing import digest_of_samples, plain_settings
from harmony_core.algorithms.env_grpo import ENVGRPO, ENVGSPO
from harmony_core.algorithms.grpo import GRPO
from harmony_core.algorithms.ppo import PPO
from harmony_core.algorithms.sft import SFT
from harmony_core.errors import DataError
from harmony_core.loggers import Logger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FloatArray: TypeAlias = "NDArray[np.float32]"

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

MOST_LOGGED = 100
"""Longest list that `log_args` sends to a logger."""


_NOT_COMPARED = {"dataset", "model", "value_model", "grader", "environment_factory", "logger", "stage_notifier"} | {
    *("callbacks", "checkpoint_restore_data", "checkpoint_frequency", "max_failure_rate")
}


def _hyperparams(algorithm: Callable[..., Any]) -> set[str]:
    return {*inspect.signature(algorithm).parameters} - _NOT_COMPARED


SFT_HYPERPARAMS = _hyperparams(SFT)
GRPO_HYPERPARAMS = _hyperparams(GRPO)
PPO_HYPERPARAMS = _hyperparams(PPO)
ENVGRPO_HYPERPARAMS = _hyperparams(ENVGRPO)
ENVGSPO_HYPERPARAMS = _hyperparams(ENVGSPO)


class ProgressCounter(Protocol):
    """What counts ended coroutines, such as a bar of `tqdm`."""

    def update(self, n: int, /) -> Any:
        """Count n more."""


async def wrap_coroutine_with_progress(coroutine: Awaitable[T], progress_counter: ProgressCounter) -> T:
    """The coroutine's result; the counter counts it when it has ended well."""
    result = await coroutine
    progress_counter.update(1)
    return result


def get_function_name(f: Callable[..., Any]) -> str:
    """The name of a function; that of the inner function for a `partial`, that of the class for another callable."""
    return str(getattr(getattr(f, "func", f), "__name__", type(f).__name__))


def _arguments(func: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def log_args(func: F) -> F:
    """Decorate a function: its arguments are sent, at each call, to every `Logger` among them.

    A model is sent as the settings that it was spawned with. Left out is what JSON cannot hold, and a list of more than
    `MOST_LOGGED` members.
    """

    @wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(func, args, kwargs)
        shown = {n: v.get_builder_args() if hasattr(v, "get_builder_args") else v for n, v in given.items()}
        config = {name: value for name, value in shown.items() if _is_short_json(value)}
        for logger in given.values():
            if isinstance(logger, Logger):
                logger.log_config(config)
        return func(*args, **kwargs)

    return call  # type: ignore[return-value]


def _is_short_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, list | tuple) or len(value) <= MOST_LOGGED


def hash_hyperparams(include: set[str]) -> Callable[[F], F]:
    """Decorate a constructor: 16 hex digits over these arguments are kept as `self._hyperparams_hash`.

    A scheduler counts by its values, so that the digits are the same in every process.
    """

    def decorate(init: F) -> F:
        @wraps(init)
        def construct(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = _arguments(init, (self, *args), kwargs)
            chosen = plain_settings({name: value for name, value in given.items() if name in include})
            text = json.dumps(chosen, sort_keys=True, default=repr)
            self._hyperparams_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
            return init(self, *args, **kwargs)

        return construct  # type: ignore[return-value]

    return decorate


def hash_dataset(dataset: Sequence[Any], num_samples: int = 5) -> str:
    """sha256 over every sample of a dataset; `num_samples` has no effect."""
    return digest_of_samples(dataset)


def flatten(nested_lists: Sequence[Sequence[T]]) -> list[T]:
    """The members of all lists, in order."""
    return list(chain.from_iterable(nested_lists))


class SingleTurnShot(TypedDict):
    """An example for a prompt: the variables of its user turn and of its answer."""

    user: dict[str, str]
    assistant: dict[str, str]


class TurnTemplates(NamedTuple):
    """The texts of a prompt, each None where the directory has no file for it."""

    system: str | None
    user: str | None
    assistant: str | None
    shots: list[SingleTurnShot] | None


def turn_templates_from_dir(root_dir: str | Path) -> TurnTemplates:
    """Read `system.md`, `user.md`, `assistant.md` and `shots.jsonl`. Raises DataError without any of them."""
    found = {name: Path(root_dir) / name for name in ("system.md", "user.md", "assistant.md", "shots.jsonl")}
    texts = [path.read_text(encoding="utf-8") if path.is_file() else None for path in found.values()]
    if not any(text is not None for text in texts):
        raise DataError(f"{root_dir} has none of {', '.join(found)}")
    try:
        shots = None if texts[3] is None else [json.loads(line) for line in texts[3].splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{found['shots.jsonl']}: not JSON lines: {error}") from None
    return TurnTemplates(texts[0], texts[1], texts[2], shots)
