"""The `train_*` calls of models with a scalar head: reward models, which score a thread, and value models."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from harmony_core.client.batching import Loss
from harmony_core.client.losses import Accepted, per_sample, setting
from harmony_core.client.training_samples import SampleTaker
from harmony_core.client.value_losses import on_last, on_tokens
from harmony_core.threads import StringThread, TokenizedThread


class ValueTaker(SampleTaker):
    """The part of a `TrainingModel` that takes samples for a scalar head.

    Each call raises UsageError for a model without one, SampleTooLong, DataError and TokenizationError; a sample that
    is refused leaves no trace.
    """

    def train_mse(self, thread: StringThread | TokenizedThread, target: float) -> Coroutine[Any, Any, None]:
        """Half the squared error of `score_last_token(thread)`: 1/2 (v - target)^2, averaged over samples.

        The step reports `mse`, the mean squared error itself.
        """

        def build() -> Accepted:
            fields = {"target": [per_sample("target", target)]}
            return Accepted([on_last(self._given(thread).thread, Loss("mse"), fields)], "samples", 1.0)

        return self._accept(build)

    def train_mse_per_token(
        self, thread: StringThread | TokenizedThread, targets: Sequence[float]
    ) -> Coroutine[Any, Any, None]:
        """Half the squared error of `score(thread)`, averaged over weighted tokens; one target for each of them.

        The step reports `mse`, the mean squared error itself.
        """
        loss = Loss("mse_per_token")
        return self._accept(lambda: on_tokens(self._given(thread).thread, loss, {"targets": targets}))

    def train_trust_region_mse(
        self,
        thread: StringThread | TokenizedThread,
        targets: Sequence[float],
        clip_center: Sequence[float],
        clip_range: float,
    ) -> Coroutine[Any, Any, None]:
        """PPO's value loss: 1/2 max((v - R)^2, (clip(v, c - e, c + e) - R)^2), averaged over weighted tokens.

        `targets`: R; `clip_center`: c, the values of the weighted tokens before the first of these steps;
        `clip_range`: e. The step reports `mse`, of the values as they are, and `value_clipfrac`, the part of the
        tokens whose gradient is cut off.
        """

        def build() -> Accepted:
            loss = Loss("trust_region_mse", (("clip_range", setting("clip_range", clip_range)),))
            return on_tokens(self._given(thread).thread, loss, {"targets": targets, "clip_center": clip_center})

        return self._accept(build)

    def train_ranking(
        self, pos_thread: StringThread | TokenizedThread, neg_thread: StringThread | TokenizedThread
    ) -> Coroutine[Any, Any, None]:
        """-log sigmoid(s+ - s-) with s = `score_last_token`, averaged over pairs (Bradley and Terry, 1952).

        A pair is one sample; both threads together must fit `max_batch_size`. The step reports `reward_accuracy`
        and `reward_margin`, the means of s+ > s- and of s+ - s-.
        """

        def build() -> Accepted:
            loss = Loss("ranking", group=2)
            pair = [on_last(self._given(thread).thread, loss) for thread in (pos_thread, neg_thread)]
            return Accepted(pair, "pairs", 1.0)

        return self._accept(build)
