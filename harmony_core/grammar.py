"""Grammars that constrain what a model may emit: which tokens are allowed next, and which were, token by token.

The masks come from llguidance. The driver checks and replays grammars, the ranks sample under them; both build their
tokenizer from the same `tokenizer.json`, so they agree on every mask.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from harmony_core.errors import DataError, UsageError

if TYPE_CHECKING:  # heavy ones: messages name constraints, and few processes use one
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from numpy.typing import NDArray

Masks: TypeAlias = "NDArray[np.int32]"
"""`[N, words]`: bit i of word w of a row says whether token 32 w + i is allowed."""
Mask: TypeAlias = "NDArray[np.int32]"
"""One row of `Masks`, `[words]`."""

Kind = Literal["json", "regex", "choice", "lark"]
"""What the text of a constraint is."""


class Constraint(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a completion must match. `text` is a JSON schema, a regular expression, a JSON list of choices, or Lark."""

    kind: Kind
    text: str

    def compiled(self) -> str:
        """The grammar for llguidance. Raises UsageError for a text that is not one, or that it cannot express."""
        from llguidance import LLMatcher

        try:
            if self.kind == "json":
                json.loads(self.text)
                grammar = str(LLMatcher.grammar_from_json_schema(self.text, defaults=_JSON))
            elif self.kind == "choice":
                # One terminal: as rules, thousands of choices are more than the parser keeps in mind.
                choices = " | ".join(map(json.dumps, self._choices()))
                grammar = str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}"))
            else:
                make = LLMatcher.grammar_from_regex if self.kind == "regex" else LLMatcher.grammar_from_lark
                grammar = str(make(self.text))
            wrong = LLMatcher.validate_grammar(grammar)
        except (ValueError, RecursionError) as error:
            wrong = str(error)
        if wrong:
            text = self.text if len(self.text) <= 200 else f"{self.text[:200]}..."
            raise UsageError(f"the {self.kind} constraint {text!r} cannot be used: {wrong}", hint=_WAYS_OUT[self.kind])
        return grammar

    def _choices(self) -> list[str]:
        choices = json.loads(self.text)
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("it must be a JSON list of at least one text, none of them empty")
        return choices


# Blanks between tokens have an end: small models repeat them for ever. A schema's own "x-guidance" comes before this.
_JSON: JsonCompileOptions = {"whitespace_pattern": r"[ ]|\n[ ]{0,20}"}
_WAYS_OUT = {
    "json": "leave the named part out of the schema and check it in the answer; json.dumps() writes JSON",
    "regex": "regular expressions have no look-around and no back-references; the whole completion must match",
    "choice": 'json.dumps(["yes", "no"])',
    "lark": "the rule `start` is the whole completion: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md",
}


@dataclass(frozen=True)
class Allowed:
    """The allowed tokens of each token of a completion; equal masks are kept once."""

    index: NDArray[np.int32]
    """`[T]`, the row of `masks` for each token."""
    masks: Masks
    """`[U, words]`."""


class GrammarTokenizer:
    """A tokenizer as grammars see it: the bytes of each token, and the tokens that end a completion."""

    def __init__(self, tokenizer_json: str, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.words = -(-vocab_size // 32)
        self._tokenizer = _tokenizer(tokenizer_json, vocab_size, tuple(id for id in stop_ids if id < vocab_size))
        # A copy begins with what the first one has learnt of its grammar, which makes its masks several times as fast.
        self._first = lru_cache(maxsize=64)(self._compile)

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the start of a completion. Raises UsageError for a constraint that cannot be used."""
        return self._first(constraint).deep_copy()

    def forget(self) -> None:
        """Forget what is known of the grammars so far: it grows with the texts that were matched, up to a limit."""
        self._first.cache_clear()

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, constraint.compiled(), log_level=0)
        if matcher.is_error():
            raise UsageError(f"the {constraint.kind} constraint cannot be used: {matcher.get_error()}")
        return matcher

    def replay(self, constraint: Constraint, tokens: Sequence[int]) -> Allowed:
        """The tokens that were allowed at each of `tokens`, which a model drew under the constraint.

        Raises DataError if the constraint does not allow one of them.
        """
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        matcher, rows, seen = self.matcher(constraint), [], dict[bytes, int]()
        for place, token in enumerate(tokens):
            mask = allocate_token_bitmask(1, self.vocab_size)
            fill_next_token_bitmask(matcher, mask)
            if not mask[0, token // 32] >> (token % 32) & 1 or not matcher.consume_token(token):
                raise DataError(f"token {token} at position {place} of a completion is not one that its grammar allows")
            rows.append(seen.setdefault(mask.tobytes(), len(seen)))
        masks = np.frombuffer(b"".join(seen), dtype=np.int32).reshape(-1, self.words)
        return Allowed(np.array(rows, dtype=np.int32), masks)


class Entry(msgspec.Struct, frozen=True):
    """A constrained sequence that is about to sample, after `tokens` (int32) that it sampled before."""

    constraint: Constraint
    stop_ids: list[int]
    tokens: bytes


@dataclass(eq=False, slots=True)
class Running:
    """The matcher of a running sequence, None if its constraint cannot be used; `ended` after a stop token."""

    matcher: LLMatcher | None
    grammar: GrammarTokenizer
    stop_ids: frozenset[int]
    ended: bool = False


Members = dict[int, Running]
"""The constrained samples of a step, by their place in it."""


@dataclass(frozen=True)
class Limits:
    """What the samples of a step must not be and what they may only be, by their place in it; the constrained ones."""

    suppressed: dict[int, list[int]]
    allowed: dict[int, Mask] = field(default_factory=dict)
    members: Members = field(default_factory=dict)

    def of(self, start: int, stop: int) -> Limits:
        """Those of the samples from `start` to before `stop`, by their place among these."""
        places = range(start, stop)
        return Limits(
            {place - start: ids for place, ids in self.suppressed.items() if place in places},
            {place - start: mask for place, mask in self.allowed.items() if place in places},
        )


class Matchers:
    """The constrained sequences that run on one rank, by their row; all ranks of a replica hold the same.

    `tokenizer_json` is called once, at the first constraint. One thread computes all masks: several of them took
    longer.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int) -> None:
        self._tokenizer_json = lru_cache(maxsize=1)(tokenizer_json)
        self._vocab_size = vocab_size
        self.words = -(-vocab_size // 32)
        self.rows: dict[int, Running] = {}
        # The constrained samples of steps whose tokens are not read yet, with what waits for them; oldest first.
        self._unread: deque[tuple[Members, Callable[[], NDArray[Any]]]] = deque()
        self._grammars: dict[tuple[int, ...], GrammarTokenizer] = {}
        self._executor: Any = None

    def limits(
        self,
        rows: Sequence[int],
        entries: Mapping[int, Entry] | None,
        suppressed: dict[int, list[int]],
        out: Masks | None = None,
    ) -> Limits:
        """The limits of a step that samples for these rows. Waits for the tokens that constrained rows go on from.

        Masks are written to the first rows of `out`, in the order of their places; without it they are new arrays.

        With `entries` the rows belong to new sequences, of which those in `entries` are constrained. Suppressed tokens
        are allowed where nothing else is, so that a completion that must end does.
        """
        for row in rows if entries is not None else ():
            self.rows.pop(row, None)
            if entries and row in entries:
                self.rows[row] = self._running(entries[row])
        members = {place: self.rows[row] for place, row in enumerate(rows) if row in self.rows}
        if not members:
            return Limits(suppressed)
        while self._unread:
            self._read()
        allowed = self._masks({place: running for place, running in members.items() if not running.ended}, out)
        held = {p: ids for p, ids in suppressed.items() if p not in allowed or self._allows_others(allowed[p], ids)}
        return Limits(held, allowed, members)

    def expect(self, members: Members, tokens: Callable[[], NDArray[Any]]) -> None:
        """Note that a step was launched; `tokens` waits for its sampled tokens, `[N]`."""
        self._unread.append((members, tokens))

    def read_through(self, members: Members) -> None:
        """Read the tokens of the launched steps up to the one with these members, unless that was done."""
        while any(unread is members for unread, _ in self._unread):
            self._read()

    def _running(self, entry: Entry) -> Running:
        import numpy as np
        from llguidance import LLExecutor

        self._executor = self._executor or LLExecutor(1)
        stops = tuple(entry.stop_ids)
        if stops not in self._grammars:
            self._grammars[stops] = GrammarTokenizer(self._tokenizer_json(), self._vocab_size, stops)
        running = Running(None, self._grammars[stops], frozenset(stops))
        try:
            running.matcher = running.grammar.matcher(entry.constraint)
            running.matcher.consume_tokens(np.frombuffer(entry.tokens, dtype=np.int32).tolist())
        except UsageError:
            pass  # nothing is allowed then: its request fails, and the others of the step do not
        return running

    def _read(self) -> None:
        """Go on with the sampled tokens of the oldest step that was not read."""
        members, wait = self._unread.popleft()
        tokens, pairs = wait(), []
        for place, running in members.items():
            token = int(tokens[place])
            running.ended = running.ended or token in running.stop_ids
            if running.matcher is not None and not running.ended:
                pairs.append((running.matcher, token))
        if pairs:
            self._executor.consume_token_par(pairs)

    def _masks(self, members: Members, out: Masks | None) -> dict[int, Mask]:
        """The tokens that each may sample next; none of them if the grammar fails."""
        import numpy as np
        from llguidance.numpy import fill_next_token_bitmask_par

        masks = np.empty((len(members), self.words), dtype=np.int32) if out is None else out[: len(members)]
        usable = [(r.matcher, i) for i, r in enumerate(members.values()) if r.matcher is not None]
        if usable:
            fill_next_token_bitmask_par(self._executor, usable, masks)
        for running, mask in zip(members.values(), masks, strict=True):
            if running.matcher is None or running.matcher.is_error():
                mask[:] = 0
                running.grammar.forget()
        return dict(zip(members, masks, strict=True))

    @staticmethod
    def _allows_others(mask: Mask, ids: Sequence[int]) -> bool:
        return int.from_bytes(mask.tobytes(), "little") & ~sum(1 << id for id in set(ids)) != 0


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str, vocab_size: int, stop_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(stop_ids))
    except ValueError:  # it reads the bytes of tokens from byte-level and byte-fallback decoders only
        return LLTokenizer(
            TokenizerWrapper(_DecodedTokens(tokenizer_json, vocab_size, stop_ids[0])), vocab_size, list(stop_ids)
        )


class _DecodedTokens:
    """The bytes of each token, as the tokenizer decodes it alone."""

    bos_token_id = None

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_id: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        special = self._tokenizer.get_added_tokens_decoder()
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(special)
        self.tokens = [b"" if id in special else self._tokenizer.decode([id]).encode() for id in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
