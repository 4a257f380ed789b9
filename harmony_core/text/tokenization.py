"""From threads to token ids and back, with a model's tokenizer and chat template.

**Weighted tokens.** The weighted tokens of an assistant turn are those that the model must emit after the prompt for
this turn: everything from the end of the prompt through the end-of-turn token, without the template's header before it
and text after it. The weighted tokens of other turns are their content, without surrounding whitespace.

**The contract.** The conversation's tokens begin with the tokens of the prompt, and the tokens after them show the
whole turn: its reasoning, text and calls. Otherwise the turn has a problem, which is an error if the turn has a weight.
Some templates write earlier turns differently once others follow. `parts` splits such a thread so that each weighted
turn stands behind the prompt that the model would have seen.

**Renderings.** The template renders a thread twice, plain and marked, and once more for the prompt of each weighted
turn. A split thread takes two renderings for each part; the prompts are shared.

The tokens are those of transformers' `apply_chat_template`; only `tokenizers` and jinja2 are used.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from harmony_core.errors import TokenizationError, UsageError, did_you_mean
from harmony_core.grammar import Constraint
from harmony_core.notifiers import say
from harmony_core.text import tokenizer_files
from harmony_core.text.chat_template import ChatTemplate
from harmony_core.text.marking import all_messages, shown
from harmony_core.text.places import (
    NOT_LOCATED,
    OTHER_TEMPLATE,
    Place,
    Prompts,
    Row,
    Stretch,
    encoded,
    generated_stretches,
    locate,
    prompts_of,
    render_whole,
)
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenizer_files import TokenizerFiles
from harmony_core.text.turns import RESERVED, GenerationRecord, TemplateKwargs, Text, TokenTurn, Turn, refuse

PROMPTS = 256  # cached prompts: tokenizing them takes most of the driver's time for a completion
MAX_GROWTH = 4.0  # how many times its tokens a split thread may take, unless more is requested
_CONTEXT = 8  # tokens before a completion that are decoded with it
_SPLIT = (
    "the template writes it otherwise once turns follow: train_language_modelling and logprobs split such a thread; "
    "elsewhere weight the last turn alone (with_weight_last_assistant_turn()), or take a template that keeps all turns"
)


class ChatTokenizer:
    """A model's tokenizer and chat template.

    `stop_ids` are the tokens at which a completion ends: those in the model's configuration, its generation
    configuration or its tokenizer, and the special token that the template writes after an assistant turn. `variables`
    are passed to the template; a thread's own take precedence. Raises UsageError for a variable that it does not read.
    """

    def __init__(self, files: TokenizerFiles, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = files.tokenizer
        self._template = files.template
        self._directory = files.directory
        self.fingerprint = files.fingerprint
        self._added = frozenset(files.tokenizer.get_added_tokens_decoder())
        self._warned: set[str] = set()
        if variables:
            self._template = self._required_template().with_variables(variables)
            for name in variables.keys() - self._template.reads:
                raise UsageError(_unread(self._template, name), hint=f"leave {name} out of chat_template_kwargs")
        # A group of completions shares one prompt. A template that writes the time is rendered each time.
        choices = self._template.choices if self._template is not None else ()
        self._writes_time = any("strftime_now" in choice.source for choice in choices)
        cached = lru_cache(0 if self._writes_time else PROMPTS)
        self._prompt_ids = cached(self._render_prompt)
        self._prompt_turns = cached(self._lay_out_prompt)
        self.stop_ids: frozenset[int] = files.stop_ids | self._template_end(files.stop_ids)

    @staticmethod
    def load(directory: Path) -> ChatTokenizer:
        """Read from a model's directory. Raises TokenizationError naming the file that is missing or wrong."""
        return ChatTokenizer(tokenizer_files.read(directory))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without added tokens. Raises TokenizationError for a lone surrogate."""
        return self._encoding(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, with special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json, with the tokens that other files declare: what `GrammarTokenizer` reads."""
        return self._tokenizer.to_str()

    def tokenless(self, size: int) -> tuple[tuple[int, int], ...]:
        """The ids below `size` without a token, as half-open ranges."""
        known = {-1, size, *self._tokenizer.get_vocab(with_added_tokens=True).values()}
        edges = sorted(id for id in known if id <= size)
        return tuple((low + 1, high) for low, high in pairwise(edges) if high > low + 1)

    def tokenize(self, thread: StringThread) -> TokenizedThread:
        """Tokenize the whole conversation, weights included.

        The positions of assistant turns without a weight are computed when they are first needed. Raises
        TokenizationError for a thread that the template refuses or does not show completely, and for a weighted turn
        that cannot be trained in the whole conversation.
        """
        template = self._template_of(thread.template_kwargs)
        layouts = self._layouts(template, thread.turns, every_turn=self._writes_time)
        ids, turns, _ = next(layouts)
        for index, turn in enumerate(turns):
            if turn.weight and turn.problem:
                deque(layouts, 0)  # raises if splitting does not help
                refuse(index, turn, _SPLIT)
        complete = all(turn.problem != NOT_LOCATED for turn in turns)
        locate = None if complete else lambda: self._lay_out(template, thread.turns, every_turn=True)[1]
        return TokenizedThread.of(thread, ids, turns, locate)

    def parts(self, thread: StringThread) -> list[TokenizedThread]:
        """Tokenize the conversation in as few parts as show each weighted turn behind its prompt.

        There is one part unless the template writes earlier turns differently once others follow. Each further part
        ends with a weighted turn. Every weighted turn has its weight in one part; assistant turns without a weight
        have no position. Raises TokenizationError.
        """
        template, parts = self._template_of(thread.template_kwargs), []
        for ids, turns, trained in self._layouts(template, thread.turns):
            if trained or not any(turn.weight for turn in turns):
                weighted = [replace(turn, weight=turn.weight * (index in trained)) for index, turn in enumerate(turns)]
                parts.append(TokenizedThread.of(thread, ids, weighted))
        return parts

    def _layouts(
        self, template: ChatTemplate, turns: Sequence[Turn], every_turn: bool = False
    ) -> Iterator[tuple[list[int], list[TokenTurn], set[int]]]:
        """The whole conversation, then shorter ones until each weighted turn could be trained in one of them.

        Yields tokens, turns and the indices of the turns to train there. Raises TokenizationError.
        """
        pending = {index for index, turn in enumerate(turns) if turn.weight}
        prompt = prompts_of(template, turns)
        while True:
            ids, laid_out = self._lay_out(template, turns, False, prompt, every_turn)
            trained = {index for index in pending if not laid_out[index].problem}
            yield ids, laid_out, trained
            pending -= trained
            if not pending:
                return
            last = max(pending)
            if last + 1 == len(turns):
                refuse(last, laid_out[last])
            turns = turns[: last + 1]

    def prompt_ids(self, thread: StringThread | TokenizedThread) -> list[int]:
        """The conversation followed by the template's prompt for an assistant turn.

        Turns that were generated with this tokenizer keep their tokens if the template shows them whole. The prompt of
        a TokenizedThread begins with its tokens; otherwise the thread is refused. Raises TokenizationError.
        """
        turns = thread.text_turns
        ids = list(self._prompt_ids(turns, thread.template_kwargs))
        if isinstance(thread, TokenizedThread) and ids[: len(thread.token_ids)] != thread.token_ids:
            _, laid_out = self._lay_out(self._template_of(thread.template_kwargs), turns, True, every_turn=True)
            problems = (
                f"with what follows, the chat template writes turn {index} otherwise: {turn.problem}"
                for index, turn in enumerate(laid_out)
                if turn.role == "assistant" and turn.problem
            )
            why = next(problems, "the chat template of this model does not write what they are")
            hint = "detokenize_thread() gives the thread as text, which the template then renders anew"
            raise TokenizationError(f"these tokens cannot be continued: {why}", hint=hint)
        return ids

    def unfinished_ids(self, thread: StringThread | TokenizedThread) -> list[int]:
        """The conversation up to the end of its last, unfinished assistant turn. Raises TokenizationError."""
        *before, last = turns = thread.text_turns
        if isinstance(thread, TokenizedThread) and thread.ends_with_last_turn():
            return list(thread.token_ids)
        if (record := last.generated_with(self.fingerprint)) is not None:
            return [*self._prompt_ids(tuple(before), thread.template_kwargs), *record.tokens]
        text, places = locate(self._template_of(thread.template_kwargs), turns, add_generation_prompt=False)
        place = places[-1]
        if place.problem or not place.prompted:
            raise TokenizationError(
                f"turn {len(before)} (assistant) cannot be continued: {place.problem}", hint=place.hint
            )
        blanks = last.text[len(last.text.rstrip()) :]
        text = text[: place.end + (len(blanks) if text.startswith(blanks, place.end) else 0)]
        return self._row(text, turns, places)[0].ids

    def completed(self, thread: TokenizedThread) -> TokenizedThread:
        """The thread with the tokens after its last turn, or the thread itself if the template writes other tokens."""
        completed = copy.copy(thread)
        try:
            completed.token_ids, _ = self._lay_out(self._template_of(thread.template_kwargs), thread.text_turns)
        except TokenizationError:
            return thread
        return completed if completed.token_ids[: len(thread.token_ids)] == thread.token_ids else thread

    def _render_prompt(self, turns: tuple[Turn, ...], variables: TemplateKwargs) -> tuple[int, ...]:
        template = self._template_of(variables)
        if any(turn.generated_with(self.fingerprint) for turn in turns):
            return tuple(self._lay_out(template, turns, True)[0])
        messages = all_messages(turns)
        text = template.render(messages, add_generation_prompt=True).text
        if any(str(message["content"]).strip() not in text for message in messages):
            render_whole(template, turns, True)  # raises if content is missing, but not if it is rewritten
        return tuple(self.encode(text))

    def _lay_out_prompt(
        self, turns: tuple[Turn, ...], variables: TemplateKwargs, prompt_ids: tuple[int, ...]
    ) -> tuple[TokenTurn, ...]:
        """The turns of a prompt, without weights; without positions if the template writes other tokens."""
        try:
            ids, laid_out = self._lay_out(self._template_of(variables), turns, True, every_turn=True)
        except TokenizationError:
            ids, laid_out = [], []
        if tuple(ids) != prompt_ids:
            problem = "the prompt was not made from this thread by the chat template"
            return tuple(TokenTurn(t.role, t.fragments, 0.0, problem=problem) for t in turns)
        return tuple(replace(turn, weight=0.0) for turn in laid_out)

    def with_completion(
        self,
        thread: StringThread | TokenizedThread,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        *,
        logprobs: Sequence[float] = (),
        sampled_logprobs: Sequence[float] = (),
        versions: Sequence[int] = (),
        masked_logprobs: Sequence[float] = (),
        constraint: Constraint | None = None,
        finished: bool = True,
        model: str = "",
        continued: bool = False,
    ) -> TokenizedThread:
        """The thread with the tokens that a model generated for `prompt_ids` as its last turn, alone with weight.

        `finished`: whether the model ended the turn itself; `model`: its name. `continued`: the completion continues
        the last turn, whose generated tokens keep their numbers; other text of it is in the turn, without weight.
        """
        turns = thread.text_turns
        start, begun = len(prompt_ids), None
        if continued:
            turns, begun = turns[:-1], turns[-1].generated_with(self.fingerprint)
            prompt = self._prompt_ids(turns, thread.template_kwargs) if begun is None else prompt_ids
            start = len(prompt) - (len(begun.tokens) if begun is not None else 0)
        tokens = (*prompt_ids[start:], *completion_ids)
        numbers = tuple(logprobs), tuple(sampled_logprobs), tuple(versions), "stop" if finished else "length"
        masked = tuple(masked_logprobs)
        record = GenerationRecord(*numbers, model, tokens, self.fingerprint, masked, constraint).after(begun)
        ended = bool(completion_ids) and completion_ids[-1] in self.stop_ids
        text = self.decode_behind(prompt_ids[:start], tokens[:-1] if ended else tokens)
        ids = [*prompt_ids, *completion_ids]
        first = len(ids) - len(completion_ids) - (len(begun.logprobs) if begun is not None else 0)
        completed = TokenTurn("assistant", (Text(text),), 1.0, first, len(ids), generation=record)
        before = self._prompt_turns(turns, thread.template_kwargs, tuple(prompt_ids[:start]))
        return TokenizedThread.of(thread, ids, [*before, completed])

    def detokenize(self, tokenized: TokenizedThread) -> StringThread:
        """The same conversation as text: turns, weights and metadata survive."""
        args = tokenized.text_turns, tokenized.metadata, tokenized.uuid(), tokenized.template_kwargs
        return StringThread.from_turns(*args)

    def decode_behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of token ids after others. Some decoders strip the space of the first token."""
        near = list(before[-_CONTEXT:])
        known, whole = self.decode(near), self.decode([*near, *ids])
        return whole[len(known) :] if whole.startswith(known) else self.decode(ids)

    def _lay_out(
        self,
        template: ChatTemplate,
        turns: Sequence[Turn],
        add_generation_prompt: bool = False,
        prompt: Prompts | None = None,
        every_turn: bool = False,
    ) -> tuple[list[int], list[TokenTurn]]:
        """Tokens and turns; for `prompt` and `every_turn` see `locate`."""
        text, places = locate(template, turns, add_generation_prompt, prompt, every_turn)
        row, generated = self._row(text, turns, places)
        laid_out = []
        for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
            record = turn.generation if index in generated else None
            if record is not None:
                end = bisect_left(row.starts, place.start) + len(record.tokens)
                span = end - len(record.logprobs or record.tokens), end, ""
            else:
                following = [p.content_start for p in places[index + 1 :] if p.content_start is not None]
                span = self._token_span(turn, place, text, row, min(following, default=len(text) + 1))
            hint = place.hint or OTHER_TEMPLATE if span[2] else ""
            laid_out.append(TokenTurn(turn.role, turn.fragments, turn.weight, *span, hint, generation=record))
        return row.ids, laid_out

    def _row(self, text: str, turns: Sequence[Turn], places: Sequence[Place]) -> tuple[Row, dict[int, Stretch]]:
        """Tokens of the rendered text and the generated turns in it. The tokens of generated turns are kept.

        The last turn is encoded separately from its prompt if a token would span both.
        """
        generated = generated_stretches(self._encoding, text, turns, places, self.fingerprint, self.stop_ids)
        row = encoded(self._encoding, text, generated.values())
        end = places[-1].start
        if places[-1].prompted and len(places) - 1 not in generated and self._behind(text, end, row) is None:
            separate = encoded(self._encoding, text, (*generated.values(), Stretch(end, end, end)))
            row = separate if self.decode(separate.ids) == self.decode(row.ids) else row
        return row, generated

    def _token_span(self, turn: Turn, place: Place, text: str, row: Row, limit: int) -> tuple[int, int, str]:
        """Token span of a turn and its problem; `limit` is the character at which the next turn's content begins."""
        if place.problem:
            return 0, 0, place.problem
        start, end = bisect_left(row.starts, place.start), bisect_left(row.starts, place.end)
        if turn.role != "assistant":
            return start, end, ""
        if place.prompted:
            behind = self._behind(text, place.start, row)
            if behind is None:
                return 0, 0, "its first characters share a token with the end of the prompt for it"
            start = behind
        for position in range(max(start, end), len(row.ids)):
            if row.starts[position] >= limit:
                break
            if row.ids[position] in self.stop_ids:
                inner = sum(token in self.stop_ids for token in row.ids[start:position])
                if inner and inner > sum(token in self.stop_ids for token in self.encode(repr(turn.fragments))):
                    return 0, 0, "the chat template writes an end-of-turn token before its end"
                return start, position + 1, ""
        names = ", ".join(sorted(str(self._tokenizer.id_to_token(i)) for i in self.stop_ids)) or "none is known"
        return 0, 0, f"the chat template writes no end-of-turn token after it (of: {names})"

    def _behind(self, text: str, end: int, row: Row) -> int | None:
        """The number of tokens of `text[:end]` alone, or None if the row does not begin with these tokens.

        The text before and after an added token is tokenized separately, so the text after the last one is enough.
        """
        last = bisect_left(row.starts, end) - 1
        while last > 0 and row.ids[last] not in self._added:
            last -= 1
        tail = self.encode(text[row.starts[last] if last > 0 else 0 : end])
        count = max(last, 0) + len(tail)
        return count if row.ids[count - len(tail) : count] == tail else None

    def _template_end(self, known: frozenset[int]) -> frozenset[int]:
        """The special token that the template writes after an assistant's content, unless a known one is there."""
        if self._template is None:
            return frozenset()
        turns = StringThread([("user", "a"), ("assistant", "b")]).turns
        try:
            text = self._template.render(all_messages(turns)).text
            span = shown(self._template, turns, text, add_generation_prompt=False)[1].span()
        except TokenizationError:
            return frozenset()
        rest = text[span[1] :].split() if span else []
        closing = self._encoding(rest[0]).ids if rest else []
        if known & {*closing}:  # the text before the known token belongs to the turn
            return frozenset()
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i in closing[:1] if i in added and added[i].special)

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizationError(f"text that is not valid Unicode cannot be tokenized: {error}") from None

    def _template_of(self, variables: TemplateKwargs) -> ChatTemplate:
        """The template with a thread's variables. Warns once about each variable that it does not read."""
        template = self._required_template().with_variables(variables)
        for name in sorted(variables.keys() - template.reads - self._warned) if variables else ():
            self._warned.add(name)
            say(f"warning: {_unread(template, name)}")
        return template

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise TokenizationError(
                f"{self._directory} has no chat template, so threads cannot be tokenized",
                hint="use raw text or tokens, or add the model with a chat_template.jinja",
            )
        return self._template


def _unread(template: ChatTemplate, name: str) -> str:
    known = [other for other in template.reads if other not in RESERVED and not other.endswith("_token")]
    hint = did_you_mean(name, known)
    return f"{template.origin}: the chat template does not read {name!r}{hint and f'; {hint}'}"
