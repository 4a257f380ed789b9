"""From threads and targets to the samples of losses on values, and which losses a model's head can have."""

from __future__ import annotations

from collections.abc import Sequence

from harmony_core.client.batching import Loss, Sample
from harmony_core.client.losses import Accepted, per_token, scored_tokens
from harmony_core.errors import DataError, UsageError
from harmony_core.threads import TokenizedThread

VALUE_LOSSES = frozenset({"mse", "mse_per_token", "trust_region_mse", "ranking"})
"""Those that are of values; every other loss is of log-probs."""

_FIELDS = {"targets": "target", "clip_center": "center"}
"""An argument's name, and the name of what the ranks get."""


def check_head(name: str, scalar: bool, loss: str) -> None:
    """Raise UsageError for a loss on values without a scalar head, or one on log-probs with it."""
    of_values = loss in VALUE_LOSSES
    if of_values and not scalar:
        raise UsageError(
            f"train_{loss} needs a scalar head, and {name!r} is a policy: it has a vocabulary head",
            hint="into_scoring_model() before spawn_train",
        )
    if scalar and not of_values:
        what = "train_language_modelling and train_tangents need" if loss == "linear" else f"train_{loss} needs"
        raise UsageError(
            f"{what} log-probs, and {name!r} has a scalar head: it gives none",
            hint=f"it is trained with {', '.join(f'train_{known}' for known in sorted(VALUE_LOSSES))}",
        )


def on_last(thread: TokenizedThread, loss: Loss, fields: dict[str, list[float]] | None = None) -> Sample:
    """The value at a thread's last token: that of all of it."""
    tokens = thread.token_ids
    if not tokens:
        raise DataError("the thread has no tokens: there is nothing to score")
    weights = [0.0] * (len(tokens) - 1) + [1.0]
    # Nothing is predicted, so the targets can be any tokens.
    return Sample(tokens, tokens, weights, loss=loss, fields=fields or {}, on_last=True)


def on_tokens(thread: TokenizedThread, loss: Loss, numbers: dict[str, Sequence[float]]) -> Accepted:
    """The values before each weighted token: of the state in which it was chosen."""
    mask = scored_tokens(thread)
    count = int(sum(mask))
    fields = {_FIELDS[name]: per_token(name, values, count) for name, values in numbers.items()}
    tokens = thread.token_ids
    return Accepted([Sample(tokens[:-1], tokens[1:], mask, loss=loss, fields=fields)], "weighted tokens", float(count))
