"""Losses that a recipe brings: functions of its file, which the rank imports by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.training.losses.terms import Scored, Sums
from harmony_core.errors import UsageError
from harmony_core.recipe_file import RecipeFile, import_file, where_raised
from harmony_core.rpc.protocol import CustomLoss


@lru_cache(maxsize=32)
def load(source: CustomLoss) -> Callable[..., Any]:
    """The function. Raises RecipeLoadError, and UsageError when the file is not what the driver loaded."""
    path = Path(source.path)
    if RecipeFile.of(path).sha256 != source.sha256:
        raise UsageError(
            f"{path} has changed since the run loaded it: the ranks would compute another {source.function}",
            hint="start the run again",
        )
    function: Callable[..., Any] = getattr(import_file(path, importable_folder=True), source.function)
    return function


def call(function: Callable[..., Any], scored: Scored) -> tuple[Tensor, Sums]:
    """The function's sum of the loss. Raises UsageError for what it raises, and for anything that is not one number.

    Random numbers that it draws are the same on all tensor-parallel ranks, and leave ours as they were.
    """
    name = getattr(function, "__name__", repr(function))
    device = scored.values.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        more = {} if scored.entropies is None else {"entropies": scored.entropies}
        try:
            total = function(scored.values, scored.slices, **more, **scored.fields)
        except Exception as error:
            place = where_raised(error, Path(inspect.getfile(function)))
            raise UsageError(f"the loss {name} raised {type(error).__name__}: {error} ({place})") from error
    if not isinstance(total, Tensor) or total.numel() != 1 or not total.is_floating_point():
        found = f"a tensor {list(total.shape)} of {total.dtype}" if isinstance(total, Tensor) else repr(total)
        raise UsageError(f"the loss {name} returned {found}", hint="return the sum of the loss, a tensor of one number")
    return total.reshape(()), {}
