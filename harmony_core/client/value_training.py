"""The `train_*` calls of models with a scalar head: reward models, which score a thread, and value models."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from harmony_core.client.batching import Loss, Sample
from harmony_core.client.losses import Accepted, number, per_token, scored_tokens
from harmony_core.errors import DataError, UsageError
from harmony_core.threads import StringThread, TokenizedThread

VALUE_LOSSES = frozenset({"mse", "mse_per_token", "trust_region_mse", "ranking"})
"""Those that are of values; every other loss is of log-probs."""


class ValueTraining:
    """What `TrainingModel` does with a scalar head. Each call raises UsageError for a model without one."""

    def _tokenized(self, thread: StringThread | TokenizedThread) -> TokenizedThread:
        raise NotImplementedError

    def _accept(self, build: Callable[[], Accepted]) -> Coroutine[Any, Any, None]:
        raise NotImplementedError

    def train_mse(self, thread: StringThread | TokenizedThread, target: float) -> Coroutine[Any, Any, None]:
        """Half the squared error of `score_last_token(thread)`: 1/2 (v - target)^2, averaged over samples.

        Raises SampleTooLong, DataError, TokenizationError; the sample then leaves no trace. So do the other calls.
        """

        def build() -> Accepted:
            fields = {"target": per_token("target", [target], 1)}
            return Accepted([_on_last(self._tokenized(thread), Loss("mse"), fields)], "samples", 1.0)

        return self._accept(build)

    def train_mse_per_token(
        self, thread: StringThread | TokenizedThread, targets: Sequence[float]
    ) -> Coroutine[Any, Any, None]:
        """Half the squared error of `score(thread)`, averaged over weighted tokens; one target for each of them."""
        return self._accept(lambda: _on_tokens(self._tokenized(thread), Loss("mse_per_token"), {"targets": targets}))

    def train_trust_region_mse(
        self,
        thread: StringThread | TokenizedThread,
        targets: Sequence[float],
        clip_center: Sequence[float],
        clip_range: float,
    ) -> Coroutine[Any, Any, None]:
        """PPO's value loss: 1/2 max((v - R)^2, (clip(v, c - e, c + e) - R)^2), averaged over weighted tokens.

        `clip_center`: the values c of each weighted token before the first of these steps; `clip_range`: e.
        """

        def build() -> Accepted:
            settings = (("clip_range", number("clip_range", clip_range)),)
            numbers = {"targets": targets, "clip_center": clip_center}
            return _on_tokens(self._tokenized(thread), Loss("trust_region_mse", settings), numbers)

        return self._accept(build)

    def train_ranking(
        self, pos_thread: StringThread | TokenizedThread, neg_thread: StringThread | TokenizedThread
    ) -> Coroutine[Any, Any, None]:
        """-log sigmoid(s+ - s-) with s = `score_last_token`, averaged over pairs (Bradley and Terry, 1952).

        Both threads together must fit a micro-batch.
        """

        def build() -> Accepted:
            pair = Loss("ranking", group=2)
            return Accepted(
                [_on_last(self._tokenized(thread), pair) for thread in (pos_thread, neg_thread)], "pairs", 1
            )

        return self._accept(build)


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


def _on_last(thread: TokenizedThread, loss: Loss, fields: dict[str, list[float]] | None = None) -> Sample:
    """The value at a thread's last token: that of all of it."""
    tokens = thread.token_ids
    if not tokens:
        raise DataError("the thread has no tokens: there is nothing to score")
    weights = [0.0] * (len(tokens) - 1) + [1.0]
    return Sample(tokens, [0] * len(tokens), weights, loss=loss, fields=fields or {}, on_last=True)


_FIELDS = {"targets": "target", "clip_center": "center"}
"""An argument's name, and the name of what the ranks get."""


def _on_tokens(thread: TokenizedThread, loss: Loss, numbers: dict[str, Sequence[float]]) -> Accepted:
    """The values before each weighted token: of the state in which it was chosen."""
    mask = scored_tokens(thread)
    count = int(sum(mask))
    fields = {_FIELDS[name]: per_token(name, values, count) for name, values in numbers.items()}
    tokens = thread.token_ids
    return Accepted([Sample(tokens[:-1], tokens[1:], mask, loss=loss, fields=fields)], "weighted tokens", float(count))
