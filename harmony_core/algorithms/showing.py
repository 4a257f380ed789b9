"""Samples for a run's report: a thread's turns, the trained ones token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harmony_core.journal import Piece, samples_wanted, tell_sample
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel

_CONTEXT = 8
"""Tokens before a turn that are decoded with it."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


async def show_sample(
    model: InferenceModel,
    thread: StringThread | TokenizedThread,
    step: int,
    *,
    source: str = "training",
    reward: float | None = None,
    advantage: float | None = None,
    group: str | int | None = None,
    grades: Mapping[str, float] | None = None,
) -> None:
    """Put a sample of optimizer step `step` (from 1) into the run's report; nothing where none is wanted any more.

    A StringThread is tokenized first, and shown in as many parts as it is trained in. Log-probs are shown where the
    thread has those of its generation.
    """
    if not samples_wanted(step, source):
        return
    for part in await model.tokenize_parts(thread) if isinstance(thread, StringThread) else [thread]:
        turns = await pieces_of(model, part)
        tell_sample(step, turns, source=source, reward=reward, advantage=advantage, group=group, grades=grades)


async def pieces_of(model: InferenceModel, thread: TokenizedThread) -> list[tuple[str, list[Piece]]]:
    """Role and pieces of every turn: one piece a token in turns with a weight, one in all in the others."""
    logprobs = iter(thread.logprobs or ())
    shown = []
    for turn in thread.token_turns:
        if turn.weight:
            before = thread.token_ids[max(turn.start - _CONTEXT, 0) : turn.start]
            texts = await token_texts(model, thread.token_ids[turn.start : turn.end], before)
            pieces = [Piece(text, turn.weight, next(logprobs, None)) for text in texts]
        else:
            pieces = [Piece("".join(str(getattr(fragment, "text", "[image]")) for fragment in turn.fragments))]
        shown.append((turn.role, pieces))
    return shown


async def token_texts(model: InferenceModel, ids: Sequence[int], behind: Sequence[int] = ()) -> list[str]:
    """The text of each token `behind` some others, so that they join to the text of all.

    Of tokens that make one character together, the last has it and the others are empty. A token is decoded behind
    its predecessors, since some tokenizers leave out the space before the first one.
    """
    texts: list[str] = []
    before: list[int] = list(behind)
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        known = await model.detokenize(before)
        text = (await model.detokenize([*before, *pending]))[len(known) :]
        if text.endswith(_UNFINISHED) and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    if pending:
        known = await model.detokenize(before)
        texts[-1] = (await model.detokenize([*before, *pending]))[len(known) :]
    return texts
