"""Checks of a loss for `train_custom`, for tests of recipes (documented path): batching must not change the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harmony_core.client import TrainingModel
from harmony_core.client.losses import Values, of_sample
from harmony_core.errors import UsageError, VerificationError
from harmony_core.text.threads import StringThread, TokenizedThread


def check_loss(
    loss: Callable[..., Any],
    logprobs: Sequence[Sequence[float]],
    *,
    entropies: Sequence[Sequence[float]] | None = None,
    group: int = 1,
    tolerance: float = 1e-9,
    **per_token: Values,
) -> None:
    """Compare a loss and its gradient over many ways to split, pack and order samples. Needs no ranks.

    The loss is compared at `logprobs`, those of each sample's weighted tokens, and at `entropies`, for a loss that
    takes them. `group` and `per_token` are as in `TrainingModel.train_custom`. The engine passes only such cuts to a
    loss, for every number of replicas and every tp, so a loss that passes is the same on all of them.
    Raises VerificationError naming the cut that differs, or if there is no finite gradient.
    """
    from harmony_core.engine.training.loss_evaluation import check_cuts

    if group < 1 or len(logprobs) < 2 * group or len(logprobs) % group:
        raise UsageError(f"{len(logprobs)} samples are not two groups of {group} or more", hint="give more samples")
    if entropies is not None and [len(row) for row in entropies] != [len(row) for row in logprobs]:
        raise UsageError("entropies and logprobs must have the same lengths")
    fields = {}
    for name, values in per_token.items():
        if len(values) != len(logprobs):
            raise UsageError(f"{name}: {len(values)} entries for {len(logprobs)} samples")
        rows = zip(values, logprobs, strict=True)
        fields[name] = [of_sample(f"{name}[{i}]", value, len(row)) for i, (value, row) in enumerate(rows)]
    check_cuts(loss, logprobs, entropies, fields, group, tolerance)


async def check_loss_on_ranks(
    loss: Callable[..., Any],
    models: Sequence[TrainingModel],
    threads: Sequence[StringThread | TokenizedThread],
    *,
    group: int = 1,
    denominator: float | None = None,
    tolerance: float = 1e-5,
    **per_token: Values,
) -> None:
    """Compare loss and gradient norm of one step over models of equal weights: other ranks, tp or `max_batch_size`.

    Each takes three steps with a learning rate of 0: all samples at once, in reverse, and each group in a micro-batch
    of its own. Pending gradients are lost, and the optimizers' state changes. `tolerance` is relative.
    Raises VerificationError naming the model and the layout that differ.
    """
    places = [list(range(first, first + group)) for first in range(0, len(threads), group)]
    layouts = {
        "all at once": [[i for members in places for i in members]],
        "in reverse": [[i for members in places[::-1] for i in members]],
        "one by one": places,
    }
    expected: dict[str, float] | None = None
    for number, model in enumerate(models):
        for layout, calls in layouts.items():
            for chosen in calls:
                fields = {name: [values[i] for i in chosen] for name, values in per_token.items()}
                given = [threads[i] for i in chosen]
                await model.train_custom(given, loss, group=group, denominator=denominator, **fields)
                model.cut_micro_batches()
            found = await model.optim_step(0.0, 0.0, float("inf"))
            expected = expected or found
            for key in ("loss", "grad_norm"):
                if not abs(found[key] - expected[key]) <= tolerance * max(1.0, abs(expected[key])):
                    raise VerificationError(
                        f"{key} of {loss.__name__} is {found[key]:.9g} on model {number}, {layout}; "
                        f"{expected[key]:.9g} on the first one, all at once",
                        hint="check_loss tells more, and needs no ranks",
                        model=number,
                        layout=layout,
                    )
