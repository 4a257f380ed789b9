"""How a model was spawned, and so how long a sequence may be: which limit binds, what would have to be set instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harmony_core.errors import NothingToTrain, TokenizationError, TooLong
from harmony_core.text.row_lengths import Lengths, Rows
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import growth

if TYPE_CHECKING:
    from harmony_core.client.live import LiveModel
    from harmony_core.memory.ledger import Plan
    from harmony_core.memory.plan import Shape
    from harmony_core.text.tokenization import ChatTokenizer


@dataclass(frozen=True)
class Placement:
    """How a model was spawned. `context`: tokens of a sequence; `explicit_kv`: the pool that was asked for."""

    context: int
    explicit_kv: int | None
    tokens_to_generate: int
    shape: Shape
    plan: Plan
    weights_key: str
    copied_from: tuple[str, Placement] | None = None

    @property
    def lora(self) -> bool:
        """Whether it has an adapter."""
        return self.shape.lora is not None

    @property
    def tp(self) -> int:
        """Ranks of a replica."""
        return self.shape.tp

    @property
    def train(self) -> bool:
        """Whether it was spawned for training."""
        return self.shape.train

    @property
    def scalar(self) -> bool:
        """Whether it has a scalar head."""
        return self.shape.scalar

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.shape.max_batch_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens of the pool; 0 where nothing is generated."""
        return self.shape.kv_tokens

    @property
    def batch_setting(self) -> str:
        """What sets `max_batch_tokens`; "" for what every inference model has."""
        return "max_batch_size" if self.train else ""


class Limit(NamedTuple):
    """At most `tokens` in a sequence because of `name`; `setting` raises it, "" where nothing does.

    Of equal limits the least is one that nothing raises.
    """

    tokens: int
    setting: str
    name: str


def of_context(placement: Placement) -> list[Limit]:
    """The model's context, and the part of it that its builder allows."""
    context = Limit(placement.shape.spec.max_positions, "", "the model's context")
    allowed = Limit(placement.context, "max_seqlen", "max_seqlen")
    return [context] if allowed.tokens == context.tokens else [context, allowed]


def of_batch(placement: Placement) -> Limit:
    """Tokens in one pass: the recipe's `max_batch_size`, or what every inference model takes."""
    setting = placement.batch_setting
    return Limit(placement.max_batch_tokens, setting, setting or "what an inference model scores at once")


def of_pool(placement: Placement) -> Limit:
    """Tokens in the pool of one replica."""
    return Limit(placement.kv_tokens, "kv_cache_len", "kv_cache_len")


def check_length(
    live: LiveModel, error: type[TooLong], tokens: int, what: str, limits: Sequence[Limit], beyond: int = 0
) -> None:
    """Raise `error`, naming the limit that binds and what helps, where `tokens` and `beyond` more are above a limit."""
    needed = tokens + beyond
    short = [limit for limit in limits if limit.tokens < needed]
    if not short:
        return
    binding, settings = min(short), sorted({limit.setting for limit in short})
    ways = [" and ".join(f"{setting}={needed}" for setting in settings)] if live.would_fit(settings, needed) else []
    raise error(
        f"{what.format(tokens)}; {live.name!r} takes at most {binding.tokens} ({binding.name})",
        hint="; or ".join([*ways, f"shorten it to at most {binding.tokens - beyond} tokens"]),
        tokens=tokens,
        limit=binding.tokens,
        needed=needed,
        setting=binding.setting,
        context=live.version.spec.max_positions,
    )


def check_growth(parts: Sequence[TokenizedThread], most: float) -> None:
    """Raise TokenizationError where a thread's parts have more than `most` times its tokens."""
    grown = growth(parts)
    if grown > most:
        raise TokenizationError(
            f"the chat template writes earlier turns otherwise once others follow: trained in {len(parts)} parts the "
            f"thread takes {grown:.3g} times its tokens, and at most {most:g} times were asked for",
            hint=f"max_growth={math.ceil(grown)}, or weight the last turn alone, or a template that keeps earlier ones",
        )


def require_weight(weights: Iterable[float]) -> float:
    """The sum of a sample's weights. Raises NothingToTrain if it is 0."""
    if (total := sum(weights)) <= 0:
        raise NothingToTrain(
            "the sample has no weighted token",
            hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
        )
    return total


@dataclass(frozen=True)
class RowGauge:
    """How long rows are for a training model. Asks no rank, and outlives the model."""

    tokenizer: ChatTokenizer
    placement: Placement

    def rows(self, name: str, rows: Sequence[Any], prompts: bool, others: Sequence[RowGauge] = ()) -> Rows:
        """A dataset of samples (threads, or tuples of them) or of prompts; the models of `others` train it as well."""
        placements = [each.placement for each in (self, *others)]
        limits = [limit for each in placements for limit in (of_context(each)[0], of_batch(each))]
        limits += [*of_context(self.placement), of_pool(self.placement)] if prompts else []
        limit, context = min(limits), of_context(self.placement)[0]
        # A prompt leaves room for a token at least.
        lengths = Lengths(limit.tokens - prompts, limit.setting, int(prompts), context.tokens)
        return Rows(name, rows, partial(self._parts, prompts), lengths)

    def _parts(self, prompts: bool, row: Any) -> list[int]:
        """Tokens of each part of a row; of a tuple, whose threads are not split, of the longest."""
        if prompts:
            return [len(self.tokenizer.prompt_ids(row))]
        if not isinstance(row, StringThread):
            return [max(len(self._whole([self.tokenizer.tokenize(thread)])[0].token_ids) for thread in row)]
        return [len(part.token_ids) for part in self._whole(self.tokenizer.parts(row))]

    def _whole(self, parts: list[TokenizedThread]) -> list[TokenizedThread]:
        if not self.placement.scalar:
            require_weight(weight for part in parts for weight in part.token_weights[1:])
        return parts
