"""The random seeds of requests: one sequence for each live model, and a separate one for each evaluation of it.

Callbacks and evaluations take their seeds from a sequence of their own (`looking`), so that they never change the seeds
of training.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class _Evaluation:
    label: str
    numbers: dict[str, int] = field(default_factory=dict)
    """The number of the next request to each model."""


_evaluation: ContextVar[_Evaluation | None] = ContextVar("evaluation", default=None)


@contextmanager
def looking(label: str) -> Iterator[None]:
    """Give separate seeds to requests inside the block and in tasks begun in it; a nested block uses the outer one's.

    The seeds depend on `label` and on the number of the request since the beginning of the block.
    """
    with contextlib.nullcontext() if _evaluation.get() is not None else apart(label):
        yield


@contextmanager
def apart(label: str) -> Iterator[None]:
    """As `looking`, but also within another block; `label` must be different each time."""
    token = _evaluation.set(_Evaluation(label))
    try:
        yield
    finally:
        _evaluation.reset(token)


def request_seed(run_seed: int, model: str, numbers: dict[str, int]) -> int:
    """The seed of a model's next request: a hash of the run's seed, the spawn's name and the request's number.

    `numbers` counts the requests outside of `looking`, by model.
    """
    evaluation = _evaluation.get()
    counted = numbers if evaluation is None else evaluation.numbers
    number = counted.get(model, 0)
    counted[model] = number + 1
    sequence = model if evaluation is None else f"{model}/look/{evaluation.label}"
    text = f"{run_seed}/{sequence}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
