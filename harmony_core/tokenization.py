"""From threads to tokens and back: a model's tokenizer and chat template, and which tokens carry a turn's weight.

**Weighted tokens.** Of an assistant turn they are what the model must emit after the prompt for it: everything from
where that prompt ends through the end-of-turn token, never the template's header before it nor what the template adds
after it. Of any other turn they are its content, without surrounding whitespace. A token that begins before a span's
start belongs to the prompt and weighs nothing.

The places are found by rendering: once plainly, once with a marker character around each turn's content, and once for
each assistant turn up to its prompt. A template that rewrites earlier turns, so that a turn's prompt is not what the
conversation begins with, makes that turn untrainable unless the template marks it with `{% generation %}`; that is an
error when the turn has a weight, never a guess.

Uses `tokenizers` and jinja2 only, and agrees token for token with transformers' `apply_chat_template`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tokenizers import Encoding

from harmony_core import tokenizer_files
from harmony_core.chat_template import ChatTemplate
from harmony_core.errors import TokenizationError
from harmony_core.fragments import Text
from harmony_core.messages import Place, all_messages, locate
from harmony_core.threads import StringThread, Turn
from harmony_core.token_threads import GenerationRecord, TokenizedThread, TokenTurn, refuse_unknown
from harmony_core.tokenizer_files import TokenizerFiles

PROMPTS = 256
"""Prompts whose tokens are remembered: making them takes longer than all else that a completion costs the driver."""


class ChatTokenizer:
    """A model's tokenizer and chat template.

    `stop_ids` are the tokens at which a completion ends: those that the model's configuration, its generation
    configuration or its tokenizer name, and the special token that the template writes after an assistant turn.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._tokenizer = files.tokenizer
        self._template = files.template
        self._directory = files.directory
        # Groups of completions have one prompt. A template that tells the time is asked each time.
        remembered = PROMPTS if self._template is None or "strftime_now" not in self._template.source else 0
        self._prompt_ids = lru_cache(remembered)(self._render_prompt)
        self._prompt_turns = lru_cache(remembered)(self._lay_out_prompt)
        self.stop_ids: frozenset[int] = files.stop_ids | self._template_end()

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

    def tokenize(self, thread: StringThread) -> TokenizedThread:
        """The whole conversation, weights included.

        Raises TokenizationError for a thread that the template refuses or leaves out in part, and for a weighted turn
        whose tokens cannot be told.
        """
        ids, turns = self._lay_out(thread.turns, add_generation_prompt=False)
        refuse_unknown(turns)
        return TokenizedThread(ids, turns, thread.metadata, thread.uuid())

    def prompt_ids(self, thread: StringThread) -> list[int]:
        """The conversation followed by the template's prompt for an assistant turn. Raises TokenizationError."""
        return list(self._prompt_ids(tuple(thread.turns)))

    def _render_prompt(self, turns: tuple[Turn, ...]) -> tuple[int, ...]:
        template = self._required_template()
        text = template.render(all_messages(turns), add_generation_prompt=True).text
        if any(turn.text.strip() not in text for turn in turns):
            locate(template, turns, add_generation_prompt=True)  # rewritten, or left out: then this raises
        return tuple(self.encode(text))

    def _lay_out_prompt(self, turns: tuple[Turn, ...], prompt_ids: tuple[int, ...]) -> tuple[TokenTurn, ...]:
        """The turns of a prompt, of no weight; without places where these tokens are not what the template makes."""
        try:
            ids, laid_out = self._lay_out(turns, add_generation_prompt=True)
        except TokenizationError:
            ids, laid_out = [], []
        if tuple(ids) != prompt_ids:
            problem = "the prompt was not made from this thread by the chat template"
            return tuple(TokenTurn(t.role, t.fragments, 0.0, problem=problem) for t in turns)
        return tuple(replace(turn, weight=0.0) for turn in laid_out)

    def with_completion(
        self,
        thread: StringThread,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        *,
        logprobs: Sequence[float] = (),
        sampled_logprobs: Sequence[float] = (),
        versions: Sequence[int] = (),
        finished: bool = True,
        model: str = "",
    ) -> TokenizedThread:
        """The thread with what a model generated for `prompt_ids` as its last turn: those very tokens, weight 1.

        All other turns get weight 0. `finished` says that the model ended the turn itself; `model` which one it was.
        """
        before = self._prompt_turns(tuple(thread.turns), tuple(prompt_ids))
        turns = [*before, self._completed(len(prompt_ids), completion_ids)]
        record = GenerationRecord(
            tuple(logprobs), tuple(sampled_logprobs), tuple(versions), "stop" if finished else "length", model
        )
        return TokenizedThread([*prompt_ids, *completion_ids], turns, thread.metadata, thread.uuid(), record)

    def detokenize(self, tokenized: TokenizedThread) -> StringThread:
        """The same conversation as text: turns, weights and metadata survive."""
        turns = [Turn(turn.role, turn.fragments, turn.weight) for turn in tokenized.token_turns]
        return StringThread.from_turns(turns, tokenized.metadata, tokenized.uuid())

    def _completed(self, start: int, completion_ids: Sequence[int]) -> TokenTurn:
        ended = bool(completion_ids) and completion_ids[-1] in self.stop_ids
        text = self.decode(completion_ids[:-1] if ended else completion_ids)
        return TokenTurn("assistant", (Text(text),), 1.0, start, start + len(completion_ids))

    def _lay_out(self, turns: Sequence[Turn], add_generation_prompt: bool) -> tuple[list[int], list[TokenTurn]]:
        text, places = locate(self._required_template(), turns, add_generation_prompt)
        encoding = self._encoding(text)
        ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        laid_out = []
        for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
            following = [p.content_start for p in places[index + 1 :] if p.content_start is not None]
            limit = min(following, default=len(text) + 1)
            start, end, problem = self._token_span(turn, place, ids, starts, limit)
            laid_out.append(TokenTurn(turn.role, turn.fragments, turn.weight, start, end, problem))
        return ids, laid_out

    def _token_span(
        self, turn: Turn, place: Place, ids: list[int], starts: list[int], limit: int
    ) -> tuple[int, int, str]:
        """Token span of a turn; `limit` is the character where the next turn's content begins."""
        if place.problem:
            return 0, 0, place.problem
        start, end = bisect_left(starts, place.start), bisect_left(starts, place.end)
        if turn.role != "assistant":
            return start, end, ""
        for position in range(end, len(ids)):
            if starts[position] >= limit:
                break
            if ids[position] in self.stop_ids:
                return start, position + 1, ""
        names = ", ".join(sorted(str(self._tokenizer.id_to_token(i)) for i in self.stop_ids)) or "none is known"
        return 0, 0, f"the chat template writes no end-of-turn token after it (of: {names})"

    def _template_end(self) -> frozenset[int]:
        """The special token that the template writes right after an assistant's content, if it does."""
        if self._template is None:
            return frozenset()
        turns = [Turn("user", (Text("a"),), 0.0), Turn("assistant", (Text("b"),), 0.0)]
        try:
            text, places = locate(self._template, turns, add_generation_prompt=False)
        except TokenizationError:
            return frozenset()
        rest = text[places[1].end :].lstrip() if not places[1].problem else ""
        first = self._encoding(rest).ids[:1]
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i in first if i in added and added[i].special)

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizationError(f"text that is not valid Unicode cannot be tokenized: {error}") from None

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise TokenizationError(
                f"{self._directory} has no chat template, so threads cannot be tokenized",
                hint="use raw text or tokens, or add the model with a chat_template.jinja",
            )
        return self._template
