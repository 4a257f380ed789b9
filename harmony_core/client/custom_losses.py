"""Losses that a recipe brings: a function of its file, which the ranks import by its name, or tangents."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.client.batching import Accepted, Loss, Sample
from harmony_core.client.losses import AnyThread, per_sample, per_token, scored_tokens
from harmony_core.errors import DataError, UsageError
from harmony_core.recipe_file import RecipeFile
from harmony_core.rpc.protocol import CustomLoss

if TYPE_CHECKING:
    from harmony_core.client.live import LiveModel

Values = Sequence[float | Sequence[float]]
"""Of each thread one number, or one for each weighted token."""

SHAPE = "def loss(logprobs, samples, *, <fields>): ... at the top level of the recipe's file"


def named(loss: Callable[..., Any], recipe: RecipeFile | None) -> CustomLoss:
    """The place of a loss function. Raises UsageError for anything but a top-level function of the recipe's file."""
    if not inspect.isfunction(loss) or inspect.iscoroutinefunction(loss) or inspect.isgeneratorfunction(loss):
        raise UsageError(f"a custom loss must be a plain function, not {loss!r}", hint=SHAPE)
    name, module = loss.__name__, sys.modules.get(loss.__module__)
    if name == "<lambda>":
        raise UsageError("a custom loss cannot be a lambda: ranks import it by its name", hint=SHAPE)
    if loss.__qualname__ != name:
        raise UsageError(f"{loss.__qualname__} is not at the top level: ranks cannot import it", hint=SHAPE)
    if recipe is None:
        raise UsageError(
            f"this client was started without a recipe, so ranks cannot import {name}",
            hint="use `adaptive run recipe.py`, get_client(recipe=FILE), or train_tangents",
        )
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != recipe.path:
        raise UsageError(
            f"{name} is of {file or loss.__module__}; ranks import losses from the recipe's file, {recipe.path}",
            hint=f"define it there: {SHAPE}",
        )
    if vars(module).get(name) is not loss:
        raise UsageError(f"{name} in {recipe.path} is another object than this function", hint="leave decorators away")
    return CustomLoss(path=str(recipe.path), sha256=recipe.sha256, function=name)


def check_fields(loss: Callable[..., Any], fields: Mapping[str, Any]) -> None:
    """Raise UsageError unless the function can be called with these fields."""
    try:
        more = {"entropies": None} if takes_entropies(loss) else {}
        inspect.signature(loss).bind(None, None, **more, **dict.fromkeys(fields))
    except TypeError as error:
        given = ", ".join(fields) or "no fields"
        raise UsageError(f"{loss.__name__} cannot be called with {given}: {error}", hint=SHAPE) from error


def takes_entropies(loss: Callable[..., Any]) -> bool:
    """Whether the function asks for entropies: by a parameter of that name."""
    return "entropies" in inspect.signature(loss).parameters


def groups(
    live: LiveModel,
    threads: Sequence[AnyThread],
    function: Callable[..., Any],
    fields: Mapping[str, Values],
    group: int,
    denominator: float | None,
) -> list[Accepted]:
    """The samples of `TrainingModel.train_custom`."""
    source = named(function, live.engine.options.recipe)
    check_fields(function, fields)
    if group < 1 or not threads or len(threads) % group:
        raise UsageError(f"{len(threads)} threads do not make groups of {group}")
    if denominator is not None and not (math.isfinite(denominator) and denominator >= 0):
        raise UsageError(f"denominator must be a finite number, 0 or more, not {denominator}")
    for name, values in fields.items():
        if isinstance(values, int | float) or len(values) != len(threads):
            found = "one number" if isinstance(values, int | float) else f"{len(values)} entries"
            raise DataError(f"{name}: {found} for {len(threads)} threads", hint=f"{name} takes one for each thread")
    settings = (("entropies", 1.0),) if takes_entropies(function) else ()
    loss = Loss("custom", settings, group, source)
    samples, counts = [], []
    for place, given in enumerate(threads):
        thread = live.tokenized(given)
        mask = scored_tokens(thread)
        counts.append(sum(mask))
        own = {name: of_sample(f"{name}[{place}]", values[place], int(counts[-1])) for name, values in fields.items()}
        samples.append(live.sample(thread, mask, loss, own))
    accepted = []
    for first in range(0, len(samples), group):
        members = samples[first : first + group]
        if denominator is None:
            accepted.append(Accepted(members, "weighted tokens", sum(counts[first : first + group])))
        else:
            accepted.append(Accepted(members, "given denominators", float(denominator)))
    return accepted


def linear(
    live: LiveModel,
    inp_tokens: Sequence[int],
    image_patches: Sequence[tuple[int, bytes]],
    tangents: Sequence[float],
    tgt_tokens: Sequence[int],
    denominator: float | None,
    sampler_logprobs: Sequence[float] | None,
) -> Accepted:
    """The sample of `TrainingModel.train_tangents`."""
    if image_patches:
        raise DataError("image patches given to a text model")
    if not len(inp_tokens) == len(tangents) == len(tgt_tokens):
        raise DataError(
            f"inp_tokens, tangents and tgt_tokens must be of one length, not {len(inp_tokens)}, "
            f"{len(tangents)} and {len(tgt_tokens)}"
        )
    tokens, targets = [int(t) for t in inp_tokens], [int(t) for t in tgt_tokens]
    live.check_ids(tokens)
    live.check_ids(targets)
    if denominator is not None and not 0 <= denominator < math.inf:
        raise DataError(f"denominator must be a finite number, 0 or more, not {denominator}")
    recorded = None if sampler_logprobs is None else [float(x) for x in sampler_logprobs]
    if recorded is not None and len(recorded) != len(tgt_tokens):
        raise DataError(f"{len(recorded)} sampler_logprobs for {len(tgt_tokens)} tgt_tokens")
    sample = Sample(tokens, targets, [float(t) for t in tangents], recorded)
    if denominator is None:
        return Accepted([sample], "tangents", float(sum(t != 0 for t in tangents)))
    return Accepted([sample], "given denominators", float(denominator))


def of_sample(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """One number for each weighted token of a sample. Raises DataError naming them."""
    if isinstance(value, int | float):
        return [per_sample(name, value)] * count
    return per_token(name, value, count)
