"""The tokens that grammars allowed in a thread's constrained turns, replayed and packed for the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from harmony_core.errors import DataError, UsageError
from harmony_core.rpc.wire import pack_ints
from harmony_core.text.threads import TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client.live import LiveModel


class AllowedTokens(NamedTuple):
    """For each target 0, or 1 + the index of its mask in `masks`; 0 allows every token. Masks are words of bits."""

    places: list[int]
    masks: list[bytes]


def allowed_tokens(live: LiveModel, thread: TokenizedThread, verb: str) -> AllowedTokens | None:
    """The allowed tokens of the targets in weighted turns with a constraint; None without such turns, or log-probs.

    Raises UsageError, naming `verb`, if they cannot be known.
    """
    constrained = (turn.weight and turn.generation and turn.generation.constraint for turn in thread.text_turns)
    if live.spawn.scalar or not any(constrained):
        return None
    allowed = AllowedTokens([0] * (len(thread.token_ids) - 1), [])
    for turn in thread.token_turns:
        record = turn.generation
        if record is None or record.constraint is None or not turn.weight or turn.start == turn.end:
            continue
        try:
            complete = len(record.masked_logprobs) == turn.end - turn.start
            if not complete or record.tokenizer != live.tokenizer.fingerprint:
                raise DataError("its tokens were not all drawn under it with this model's tokenizer")
            found = live.grammar.replay(record.constraint, thread.token_ids[turn.start : turn.end])
        except DataError as error:
            kind, hint = record.constraint.kind, "StringThread(thread.get_turns()) of its text has no constraint"
            what = f"{verb} cannot renormalise a completion with a {kind} constraint: {error.message}"
            raise UsageError(what, hint=hint) from error
        allowed.places[turn.start - 1 : turn.end - 1] = [1 + len(allowed.masks) + row for row in found.index.tolist()]
        allowed.masks.extend(mask.tobytes() for mask in found.masks)
    return allowed


def packed(sequences: Sequence[tuple[int, AllowedTokens | None]]) -> tuple[bytes, bytes]:
    """`allowed` and `masks` of a message with these sequences, each with its number of targets; equal masks once."""
    rows: dict[bytes, int] = {}
    index: list[int] = []
    for count, own in sequences:
        numbers = [0, *(1 + rows.setdefault(mask, len(rows)) for mask in own.masks)] if own else [0]
        index += [numbers[place] for place in own.places] if own else [0] * count
    return (pack_ints(index), b"".join(rows)) if rows else (b"", b"")
