"""The place of each turn in the rendered text of its conversation, and why a turn cannot be trained there.

An assistant turn begins where the prompt for it ends: the template's rendering of the turns before it. The text after
the prompt is what the model would have to emit, and it must show the whole turn. The tokens of a generated turn replace
its text; the text before and after them is encoded separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from typing import NamedTuple

from tokenizers import Encoding

from harmony_core.errors import TokenizationError
from harmony_core.text.chat_template import ChatTemplate, Rendered
from harmony_core.text.marking import Shown, all_messages, shown
from harmony_core.text.turns import FunctionCall, Reasoning, Text, Turn

OTHER_TEMPLATE = "take another chat template (models add --chat-template)"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
NOT_LOCATED = "it had no weight when the thread was tokenized in parts"
_ORDER = {Reasoning: 0, FunctionCall: 2}

Prompts = Callable[[int], str | None]
Encode = Callable[[str], Encoding]


@dataclass(frozen=True)
class Place:
    """Character span of one turn in the rendered text.

    For an assistant turn `start` is the end of its prompt and `end` the end of its content (the end-of-turn token
    follows); for other turns the span is the content. `content_start` is None if it is unknown. `prompted` is true if
    the text up to `start` is the prompt. `problem` is the reason why the turn cannot be trained, `hint` a way out.
    """

    start: int = 0
    end: int = 0
    content_start: int | None = None
    prompted: bool = False
    problem: str = ""
    hint: str = ""


def render_whole(
    template: ChatTemplate, turns: Sequence[Turn], add_generation_prompt: bool
) -> tuple[Rendered, list[Shown]]:
    """Render a conversation, plain and marked. Raises TokenizationError if the template leaves out a turn."""
    rendered = template.render(all_messages(turns), add_generation_prompt)
    found = shown(template, turns, rendered.text, add_generation_prompt)
    for index, (turn, its) in enumerate(zip(turns, found, strict=True)):
        if its.left_out():
            problem = f"the chat template leaves out the text of turn {index} ({turn.role})"
            raise TokenizationError(f"{template.origin}: {problem}")
    return rendered, found


def prompts_of(template: ChatTemplate, turns: Sequence[Turn]) -> Prompts:
    """A cached function that renders the prompt for a turn, or returns None if the template refuses it."""
    return cache(partial(_prompt_before, template, turns))


def locate(
    template: ChatTemplate,
    turns: Sequence[Turn],
    add_generation_prompt: bool,
    prompt: Prompts | None = None,
    every_turn: bool = False,
) -> tuple[str, list[Place]]:
    """Render a conversation and find its turns. Raises TokenizationError if the template leaves out a turn.

    The template renders the conversation twice, plain and marked, and the prompt of each assistant turn that is looked
    for. These are the turns with a weight or a generation record and the last turn, or `every_turn`.
    """
    rendered, found = render_whole(template, turns, add_generation_prompt)
    text, prompt = rendered.text, prompt or prompts_of(template, turns)
    assistants = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    blocks = rendered.generations if len(rendered.generations) == len(assistants) else ()
    generated = dict(zip(assistants, (start for start, _ in blocks), strict=False))
    places = []
    for index, (turn, its) in enumerate(zip(turns, found, strict=True)):
        span = its.span()
        if turn.role != "assistant":
            problem = its.problem()
            places.append(Place(*span, span[0]) if span and not problem else Place(problem=problem))
        elif not every_turn and not turn.weight and turn.generation is None and index + 1 < len(turns):
            places.append(Place(content_start=span[0] if span else None, problem=NOT_LOCATED))
        else:
            places.append(_assistant_place(index, turn, text, prompt(index), its, generated.get(index)))
    if places[-1].hint and turns[-1].weight and prompt(len(turns) - 1) is not None:
        places[-1] = replace(places[-1], hint=_ways_out(template, turns))
    return text, places


def _prompt_before(template: ChatTemplate, turns: Sequence[Turn], index: int) -> str | None:
    try:
        return template.render(all_messages(turns[:index]) if index else [], add_generation_prompt=True).text
    except TokenizationError:
        return None


def _assistant_place(index: int, turn: Turn, text: str, prompt: str | None, its: Shown, block: int | None) -> Place:
    """The place of an assistant turn. `block` is the start of its generation block, if the template marks it."""
    prompted = behind_prompt = prompt is not None and text.startswith(prompt)
    start = len(prompt) if prompt is not None and prompted else 0
    span = its.span(start)
    content_start = span[0] if span else None
    if not prompted and not index:
        # Many templates have no prompt for a conversation that the assistant begins.
        start = next((at for at in (block, content_start) if at is not None), 0)
        prompted = content_start is not None or block is not None
        behind_prompt = prompt is not None and start == len(prompt)
    if problem := _disorder(turn) or its.problem(start):
        return Place(content_start=content_start, problem=problem)
    if not prompted:
        return Place(content_start=content_start, problem=_mismatch(prompt, text), hint=OTHER_TEMPLATE)
    return Place(start, max(start, span[1]) if span else start, content_start, behind_prompt)


def _disorder(turn: Turn) -> str:
    """A message has one thought, then one text, then calls; templates would write other orders like this one."""
    ranks = [_ORDER.get(type(part), 1) for part in turn.fragments if part not in (Text(""), Reasoning(""))]
    return "" if ranks == sorted(ranks) else "its parts must be in the order of a message: reasoning, text, calls"


def _mismatch(prompt: str | None, text: str) -> str:
    """How the prompt for a turn differs from the beginning of the conversation."""
    if prompt is None:
        return "the chat template has no prompt for it"
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    return (
        f"the chat template's prompt for it is not what the rendered conversation begins with: it goes on with "
        f"{prompt[shared : shared + 60]!r} where the conversation has {text[shared : shared + 60]!r}"
    )


def _ways_out(template: ChatTemplate, turns: Sequence[Turn]) -> str:
    """Changes after which the conversation begins with the prompt for its last turn."""
    *before, turn = turns
    ways = []
    calls = [part for part in turn.fragments if isinstance(part, FunctionCall)]
    thoughtful = [*before, replace(turn, fragments=(Text(_EMPTY_THOUGHT + turn.text), *calls))]
    if _continues(template, thoughtful):
        ways.append(f"begin its text with an empty thought, {_EMPTY_THOUGHT!r}")
    if "enable_thinking" in template.reads:
        ways += [
            f'chat_template_kwargs={{"enable_thinking": {on}}}'
            for on in (False, True)
            if _continues(template.with_variables({"enable_thinking": on}), turns)
        ]
    return ", or ".join([*ways, OTHER_TEMPLATE])


def _continues(template: ChatTemplate, turns: Sequence[Turn]) -> bool:
    """Whether the rendered conversation begins with the prompt for its last turn and shows all of that turn."""
    *before, last = turns
    try:
        _, places = locate(template, [*before, replace(last, weight=0.0)], add_generation_prompt=False)
    except TokenizationError:
        return False
    return places[-1].prompted and not places[-1].problem


class Row(NamedTuple):
    """Token ids and the character at which each token begins."""

    ids: list[int]
    starts: list[int]


class Stretch(NamedTuple):
    """Characters `start` to `end` of a text, replaced by `ids`; the last id begins at character `last`."""

    start: int
    last: int
    end: int
    ids: tuple[int, ...] = ()


def encoded(encode: Encode, text: str, stretches: Iterable[Stretch] = ()) -> Row:
    """The tokens of a text. A stretch has its own tokens; the text before and after it is encoded separately."""
    row, at = Row([], []), 0
    for start, last, end, ids in (*stretches, Stretch(len(text), len(text), len(text))):
        encoding = encode(text[at:start])
        row.ids.extend(encoding.ids)
        row.starts.extend(at + begin for begin, _ in encoding.offsets)
        if ids:
            row.ids.extend(ids)
            row.starts.extend([start] * (len(ids) - 1) + [last])
        at = end
    return row


def generated_stretches(
    encode: Encode, text: str, turns: Sequence[Turn], places: Sequence[Place], tokenizer: str, ends: frozenset[int]
) -> dict[int, Stretch]:
    """For each turn that was generated with this tokenizer, its tokens and the text that they replace.

    The last token of a finished turn replaces the end-of-turn token (one of `ends`) that the template writes.
    """
    found = {}
    for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
        record = turn.generated_with(tokenizer)
        if record is None or place.problem or not place.prompted:
            continue
        last = end = place.end
        if record.tokens[-1] in ends:
            limit = next((p.content_start for p in places[index + 1 :] if p.content_start is not None), len(text))
            rest = encode(text[end:limit])
            for token, (begin, stop) in zip(rest.ids, rest.offsets, strict=True):
                if token in ends:
                    last, end = place.end + begin, place.end + stop
                    break
        found[index] = Stretch(place.start, last, end, record.tokens)
    return found
