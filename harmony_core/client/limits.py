"""The limits of a model's sequences, and the lengths of rows against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harmony_core.client.batching import require_weight
from harmony_core.errors import TooLong
from harmony_core.rpc.protocol import Spawn
from harmony_core.text.row_lengths import Lengths, Rows
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client.live import LiveModel
    from harmony_core.text.tokenization import ChatTokenizer


class Limit(NamedTuple):
    """A sequence has at most `tokens` because of `name`; raising `setting` raises the limit, "" if no setting does.

    Of equal limits, one that no setting raises sorts first.
    """

    tokens: int
    setting: str
    name: str


def of_context(spawn: Spawn) -> list[Limit]:
    """The model's context, and the part of it that its builder allows."""
    context = Limit(spawn.spec.max_positions, "", "the model's context")
    allowed = spawn.max_seqlen
    return [context] if allowed in (None, context.tokens) else [context, Limit(allowed, "max_seqlen", "max_seqlen")]


def of_batch(spawn: Spawn) -> Limit:
    """Tokens in one pass: the recipe's `max_batch_size`, or the constant of all inference models."""
    setting = "max_batch_size" if spawn.train else ""
    return Limit(spawn.max_batch_tokens, setting, setting or "what an inference model scores at once")


def of_pool(spawn: Spawn) -> Limit:
    """Tokens in the page pool of one replica."""
    return Limit(spawn.kv_tokens, "kv_cache_len", "kv_cache_len")


def check_length(
    live: LiveModel, error: type[TooLong], tokens: int, what: str, limits: Sequence[Limit], beyond: int = 0
) -> None:
    """Raise `error` if `tokens + beyond` is above a limit, naming that limit and the settings that help."""
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


@dataclass(frozen=True)
class RowGauge:
    """Measures rows for a training model. Needs no rank, and outlives the model."""

    tokenizer: ChatTokenizer
    spawn: Spawn

    def rows(self, name: str, rows: Sequence[Any], prompts: bool, others: Sequence[RowGauge] = ()) -> Rows:
        """A dataset of samples (threads, or tuples of them) or of prompts; the `others` train on it as well."""
        spawns = [each.spawn for each in (self, *others)]
        limits = [limit for each in spawns for limit in (of_context(each)[0], of_batch(each))]
        limits += [*of_context(self.spawn), of_pool(self.spawn)] if prompts else []
        limit, context = min(limits), of_context(self.spawn)[0]
        # A prompt leaves room for at least one token.
        lengths = Lengths(limit.tokens - prompts, limit.setting, int(prompts), context.tokens)
        return Rows(name, rows, partial(self._parts, prompts), lengths)

    def _parts(self, prompts: bool, row: Any) -> list[int]:
        """Tokens of each part of a row; for a tuple, whose threads are not split, those of the longest thread."""
        if prompts:
            return [len(self.tokenizer.prompt_ids(row))]
        if not isinstance(row, StringThread):
            return [max(len(self._whole([self.tokenizer.tokenize(thread)])[0].token_ids) for thread in row)]
        return [len(part.token_ids) for part in self._whole(self.tokenizer.parts(row))]

    def _whole(self, parts: list[TokenizedThread]) -> list[TokenizedThread]:
        if not self.spawn.scalar:
            require_weight(weight for part in parts for weight in part.token_weights[1:])
        return parts
