"""The random seeds of requests: one sequence for each live model, and a separate one for each evaluation of it.

Callbacks and evaluations take their seeds from a sequence of their own (`looking`), so that they never change the seeds
of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class _Look:
    label: str
    numbers: dict[str, int] = field(default_factory=dict)
    """Of each model, the number of the look's next request."""


_look: ContextVar[_Look | None] = ContextVar("look", default=None)


@contextmanager
def looking(label: str) -> Iterator[None]:
    """Requests inside, and in tasks begun inside, have seeds of their own; a look within a look is a part of it.

    The seeds depend on `label` and on the number of the request in the look.
    """
    if _look.get() is not None:
        yield
        return
    token = _look.set(_Look(label))
    try:
        yield
    finally:
        _look.reset(token)


def request_seed(run_seed: int, model: str, numbers: dict[str, int]) -> int:
    """The seed of a model's next request: a hash of the run's seed, the spawn's name and the request's number.

    `numbers` counts the requests that belong to no look, by model.
    """
    look = _look.get()
    counted = numbers if look is None else look.numbers
    number = counted.get(model, 0)
    counted[model] = number + 1
    text = f"{run_seed}/{model}/{number}" if look is None else f"{run_seed}/{model}/look/{look.label}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
