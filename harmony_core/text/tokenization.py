"""From threads to tokens and back: a model's tokenizer and chat template, and which tokens carry a turn's weight.

**Weighted tokens.** Of an assistant turn they are what the model must emit after the prompt that it would have been
given: everything from where that prompt ends through the end-of-turn token, never the template's header before it nor
what the template adds after it. Of any other turn they are its content, without surrounding whitespace.

**The contract.** The tokens of that prompt are what the conversation's begin with, and what follows them shows all of
the turn: its reasoning, its text, its calls. A turn for which this does not hold has a problem, which is an error when
it has a weight. Where a template writes earlier turns otherwise once others follow, `parts` splits a thread, so that
each weighted turn stands behind the prompt that the model would have seen.

Uses `tokenizers` and jinja2 only, and agrees token for token with transformers' `apply_chat_template`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from harmony_core.errors import TokenizationError, UsageError, did_you_mean
from harmony_core.notifiers import say
from harmony_core.text import tokenizer_files
from harmony_core.text.chat_template import ChatTemplate
from harmony_core.text.fragments import Text
from harmony_core.text.marking import all_messages, shown
from harmony_core.text.places import (
    OTHER_TEMPLATE,
    Place,
    Prompts,
    Row,
    Stretch,
    drawn_stretches,
    encoded,
    locate,
    prompt_before,
)
from harmony_core.text.threads import StringThread, Turn
from harmony_core.text.token_threads import TokenizedThread, TokenTurn, refuse
from harmony_core.text.tokenizer_files import TokenizerFiles
from harmony_core.text.turns import RESERVED, GenerationRecord, TemplateKwargs

PROMPTS = 256
"""Prompts whose tokens are remembered: making them takes longer than all else that a completion costs the driver."""

MAX_GROWTH = 4.0
"""How many times its tokens a thread may take that is trained in parts, unless more is asked for."""

_CONTEXT = 8
"""Tokens before a completion that are decoded with it."""

_SPLIT = (
    "the template writes it otherwise once turns follow: train_language_modelling and logprobs split such a thread; "
    "elsewhere weight the last turn alone (with_weight_last_assistant_turn()), or take a template that keeps all turns"
)


_AS_TEXT = "detokenize_thread() gives the thread as text, which the template then renders anew"


class ChatTokenizer:
    """A model's tokenizer and chat template.

    `stop_ids` are the tokens at which a completion ends: those that the model's configuration, its generation
    configuration or its tokenizer name, and the special token that the template writes after an assistant turn.
    `variables` are given to the template; a thread's own win. Raises UsageError for one that it does not read.
    """

    def __init__(self, files: TokenizerFiles, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = files.tokenizer
        self._template = files.template
        self._directory = files.directory
        self._fingerprint = files.fingerprint
        self._added = frozenset(files.tokenizer.get_added_tokens_decoder())
        self._told: set[str] = set()
        if variables:
            self._template = self._required_template().with_variables(variables)
            for name in variables.keys() - self._template.reads:
                raise UsageError(_unread(self._template, name), hint=f"leave {name} out of chat_template_kwargs")
        # Groups of completions have one prompt. A template that tells the time is asked each time.
        sources = [choice.source for choice in self._template.choices] if self._template is not None else []
        remembered = 0 if any("strftime_now" in source for source in sources) else PROMPTS
        self._prompt_ids = lru_cache(remembered)(self._render_prompt)
        self._prompt_turns = lru_cache(remembered)(self._lay_out_prompt)
        self.stop_ids: frozenset[int] = files.stop_ids | self._template_end(files.stop_ids)

    @staticmethod
    def load(directory: Path) -> ChatTokenizer:
        """Read from a model's directory. Raises TokenizationError naming the file that is missing or wrong."""
        return ChatTokenizer(tokenizer_files.read(directory))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added before or after. Raises TokenizationError for a lone surrogate."""
        return self._encoding(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def tokenless(self, size: int) -> tuple[tuple[int, int], ...]:
        """The ids below `size` that no token has, as ranges whose last id is left out."""
        known = {-1, size, *self._tokenizer.get_vocab(with_added_tokens=True).values()}
        edges = sorted(id for id in known if id <= size)
        return tuple((low + 1, high) for low, high in pairwise(edges) if high > low + 1)

    def tokenize(self, thread: StringThread) -> TokenizedThread:
        """The whole conversation, weights included.

        Raises TokenizationError for a thread that the template refuses or leaves out in part, and for a weighted turn
        that cannot be trained in the whole.
        """
        ids, turns = self._lay_out(self._template_of(thread.template_kwargs), thread.turns, add_generation_prompt=False)
        for index, turn in enumerate(turns):
            if turn.weight and turn.problem:
                self.parts(thread)  # raises what no split mends
                refuse(index, turn, _SPLIT)
        return TokenizedThread.of(thread, ids, turns)

    def parts(self, thread: StringThread) -> list[TokenizedThread]:
        """The conversation in as few parts as show each weighted turn behind the prompt that it would have had.

        That is the whole, unless the template writes earlier turns otherwise once others follow; each further part
        ends with a weighted turn. Every weighted turn has its weight in one part; an assistant turn without one has no
        place there. Raises TokenizationError.
        """
        pending = {index for index, turn in enumerate(thread.turns) if turn.weight}
        parts: list[TokenizedThread] = []
        template, end = self._template_of(thread.template_kwargs), len(thread.turns)
        prompt = cache(partial(prompt_before, template, thread.turns))  # each is the same for every part
        while True:
            ids, turns = self._lay_out(template, thread.turns[:end], False, prompt)
            taken = {index for index in pending if not turns[index].problem}
            if taken or not pending:
                weighted = [replace(turn, weight=turn.weight * (index in taken)) for index, turn in enumerate(turns)]
                parts.append(TokenizedThread.of(thread, ids, weighted))
            pending -= taken
            if not pending:
                return parts
            last = max(pending)
            if last + 1 == end:
                refuse(last, turns[last])
            end = last + 1

    def prompt_ids(self, thread: StringThread | TokenizedThread) -> list[int]:
        """The conversation followed by the template's prompt for an assistant turn.

        Turns that were drawn with this tokenizer keep their tokens, where the template shows them whole; a
        TokenizedThread's tokens are what the prompt begins with, or it is refused. Raises TokenizationError.
        """
        turns = self.detokenize(thread).turns if isinstance(thread, TokenizedThread) else thread.turns
        ids = list(self._prompt_ids(tuple(turns), thread.template_kwargs))
        if isinstance(thread, TokenizedThread) and ids[: len(thread.token_ids)] != thread.token_ids:
            _, laid_out = self._lay_out(self._template_of(thread.template_kwargs), turns, add_generation_prompt=True)
            problems = (
                f"with what follows, the chat template writes turn {index} otherwise: {turn.problem}"
                for index, turn in enumerate(laid_out)
                if turn.role == "assistant" and turn.problem
            )
            why = next(problems, "the chat template of this model does not write what they are")
            raise TokenizationError(f"these tokens cannot be continued: {why}", hint=_AS_TEXT)
        return ids

    def unfinished_ids(self, thread: StringThread | TokenizedThread) -> list[int]:
        """The conversation up to where its last turn, an assistant's, breaks off. Raises TokenizationError."""
        *before, last = thread.token_turns if isinstance(thread, TokenizedThread) else thread.turns
        if isinstance(thread, TokenizedThread) and isinstance(last, TokenTurn) and last.end == len(thread.token_ids):
            return list(thread.token_ids)
        if (record := last.drawn_with(self._fingerprint)) is not None:
            return [*self._prompt_ids(tuple(before), thread.template_kwargs), *record.tokens]
        turns = (*before, last)
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
        """The tokens with what the template writes behind the last turn, as the thread's text would have them.

        The thread itself where the template does not write what these tokens are.
        """
        turns = self.detokenize(thread).turns
        try:
            ids, _ = self._lay_out(self._template_of(thread.template_kwargs), turns, add_generation_prompt=False)
        except TokenizationError:
            return thread
        if ids[: len(thread.token_ids)] != thread.token_ids:
            return thread
        return TokenizedThread.of(thread, ids, thread.token_turns)

    def _render_prompt(self, turns: tuple[Turn, ...], variables: TemplateKwargs) -> tuple[int, ...]:
        template = self._template_of(variables)
        if any(turn.drawn_with(self._fingerprint) for turn in turns):
            return tuple(self._lay_out(template, turns, add_generation_prompt=True)[0])
        messages = all_messages(turns)
        text = template.render(messages, add_generation_prompt=True).text
        if any(str(message["content"]).strip() not in text for message in messages):
            locate(template, turns, add_generation_prompt=True)  # rewritten, or left out: then this raises
        return tuple(self.encode(text))

    def _lay_out_prompt(
        self, turns: tuple[Turn, ...], variables: TemplateKwargs, prompt_ids: tuple[int, ...]
    ) -> tuple[TokenTurn, ...]:
        """The turns of a prompt, of no weight; without places where these tokens are not what the template makes."""
        try:
            ids, laid_out = self._lay_out(self._template_of(variables), turns, add_generation_prompt=True)
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
        finished: bool = True,
        model: str = "",
        continued: bool = False,
    ) -> TokenizedThread:
        """The thread with what a model generated for `prompt_ids` as its last turn: those very tokens, weight 1.

        All other turns get weight 0. `finished` says that the model ended the turn itself; `model` which one it was.
        `continued`: the completion goes on with the last turn. What was drawn of it before keeps its numbers; a text
        that nobody drew becomes part of the turn, but not of its weighted tokens.
        """
        turns = tuple(self.detokenize(thread).turns if isinstance(thread, TokenizedThread) else thread.turns)
        start, begun = len(prompt_ids), None
        if continued:
            turns, begun = turns[:-1], turns[-1].drawn_with(self._fingerprint)
            prompt = self._prompt_ids(turns, thread.template_kwargs) if begun is None else prompt_ids
            start = len(prompt) - (len(begun.tokens) if begun is not None else 0)
        tokens = (*prompt_ids[start:], *completion_ids)
        finish, numbers = "stop" if finished else "length", (tuple(logprobs), tuple(sampled_logprobs), tuple(versions))
        record = GenerationRecord(*numbers, finish, model, tokens, self._fingerprint).after(begun)
        ended = bool(completion_ids) and completion_ids[-1] in self.stop_ids
        text = self.decode_behind(prompt_ids[:start], tokens[:-1] if ended else tokens)
        ids = [*prompt_ids, *completion_ids]
        drawn_from = len(prompt_ids) - (len(begun.logprobs) if begun is not None else 0)
        completed = TokenTurn("assistant", (Text(text),), 1.0, drawn_from, len(ids), generation=record)
        before = self._prompt_turns(turns, thread.template_kwargs, tuple(prompt_ids[:start]))
        return TokenizedThread.of(thread, ids, [*before, completed])

    def detokenize(self, tokenized: TokenizedThread) -> StringThread:
        """The same conversation as text: turns, weights and metadata survive."""
        turns = [Turn(t.role, t.fragments, t.weight, generation=t.generation) for t in tokenized.token_turns]
        return StringThread.from_turns(turns, tokenized.metadata, tokenized.uuid(), tokenized.template_kwargs)

    def decode_behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of token ids that stand behind others. Some decoders take the blank from what they read first."""
        near = list(before[-_CONTEXT:])
        known, whole = self.decode(near), self.decode([*near, *ids])
        return whole[len(known) :] if whole.startswith(known) else self.decode(ids)

    def _lay_out(
        self,
        template: ChatTemplate,
        turns: Sequence[Turn],
        add_generation_prompt: bool,
        trained: Prompts | None = None,
    ) -> tuple[list[int], list[TokenTurn]]:
        """Tokens and turns; `trained`: the prompts of `locate`, where only what is trained needs its place."""
        text, places = locate(template, turns, add_generation_prompt, trained)
        row, drawn = self._row(text, turns, places)
        laid_out = []
        for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
            if index in drawn:
                start = bisect_left(row.starts, place.start)
                end = start + len(drawn[index].ids)
                kept = turn.generation
                start = end - len(kept.logprobs) if kept is not None and kept.logprobs else start
                laid_out.append(TokenTurn(turn.role, turn.fragments, turn.weight, start, end, generation=kept))
                continue
            following = [p.content_start for p in places[index + 1 :] if p.content_start is not None]
            limit = min(following, default=len(text) + 1)
            start, end, problem = self._token_span(turn, place, text, row, limit)
            hint = place.hint or (OTHER_TEMPLATE if problem else "")
            laid_out.append(TokenTurn(turn.role, turn.fragments, turn.weight, start, end, problem, hint))
        return row.ids, laid_out

    def _row(self, text: str, turns: Sequence[Turn], places: Sequence[Place]) -> tuple[Row, dict[int, Stretch]]:
        """Tokens of the rendered text, those of drawn turns as they were drawn; the last turn behind its prompt's."""
        drawn = drawn_stretches(self._encoding, text, turns, places, self._fingerprint, self.stop_ids)
        row = encoded(self._encoding, text, drawn.values())
        end = places[-1].start
        if places[-1].prompted and len(places) - 1 not in drawn and self._behind(text, end, row) is None:
            joined = encoded(self._encoding, text, (*drawn.values(), Stretch(end, end, end)))
            row = joined if self.decode(joined.ids) == self.decode(row.ids) else row
        return row, drawn

    def _token_span(self, turn: Turn, place: Place, text: str, row: Row, limit: int) -> tuple[int, int, str]:
        """Token span of a turn; `limit` is the character where the next turn's content begins."""
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
                inner = self._stops(row.ids[start:position])
                if inner and inner > self._stops(self.encode(repr(turn.fragments))):
                    return 0, 0, "the chat template writes an end-of-turn token before its end"
                return start, position + 1, ""
        names = ", ".join(sorted(str(self._tokenizer.id_to_token(i)) for i in self.stop_ids)) or "none is known"
        return 0, 0, f"the chat template writes no end-of-turn token after it (of: {names})"

    def _stops(self, ids: Sequence[int]) -> int:
        return sum(token in self.stop_ids for token in ids)

    def _behind(self, text: str, end: int, row: Row) -> int | None:
        """How many tokens `text[:end]` alone has, if they are what the row begins with.

        Text is tokenized apart on both sides of an added token, so only what follows the last one is looked at.
        """
        last = bisect_left(row.starts, end) - 1
        while last > 0 and row.ids[last] not in self._added:
            last -= 1
        tail = self.encode(text[row.starts[last] if last > 0 else 0 : end])
        count = max(last, 0) + len(tail)
        return count if row.ids[count - len(tail) : count] == tail else None

    def _template_end(self, known: frozenset[int]) -> frozenset[int]:
        """The special token that the template writes right after an assistant's content, if none is known there."""
        if self._template is None:
            return frozenset()
        turns = [Turn("user", (Text("a"),), 0.0), Turn("assistant", (Text("b"),), 0.0)]
        try:
            text = self._template.render(all_messages(turns)).text
            span = shown(self._template, turns, text, add_generation_prompt=False)[1].span()
        except TokenizationError:
            return frozenset()
        rest = text[span[1] :].split() if span else []
        closing = self._encoding(rest[0]).ids if rest else []
        if known & {*closing}:  # what comes before it is within the turn
            return frozenset()
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i in closing[:1] if i in added and added[i].special)

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizationError(f"text that is not valid Unicode cannot be tokenized: {error}") from None

    def _template_of(self, variables: TemplateKwargs) -> ChatTemplate:
        """The template with a thread's variables. What it does not read is told once."""
        template = self._required_template().with_variables(variables)
        for name in sorted(variables.keys() - template.reads - self._told) if variables else ():
            self._told.add(name)
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
    known = [read for read in template.reads if read not in RESERVED and not read.endswith("_token")]
    hint = did_you_mean(name, known)
    return f"{template.origin}: the chat template does not read {name!r}{hint and f'; {hint}'}"


def growth(parts: Sequence[TokenizedThread]) -> float:
    """How many times the tokens of its longest part the parts of a thread have together; 1 where it is not split."""
    lengths = [len(part.token_ids) for part in parts]
    return sum(lengths) / max(lengths)
