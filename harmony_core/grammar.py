"""Grammars that constrain what a model may emit: which tokens are allowed next, and which were, token by token.

The masks come from llguidance. The driver checks and replays grammars, the ranks sample under them; both build their
tokenizer from the same `tokenizer.json`, so they agree on every mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from harmony_core.errors import DataError, UsageError

if TYPE_CHECKING:  # heavy ones: messages name constraints, and few processes use one
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

Masks: TypeAlias = "NDArray[np.int32]"
"""`[N, words]`: bit i of word w of a row says whether token 32 w + i is allowed."""


class Constraint(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a completion must match. `text` is a JSON schema, a regular expression, a JSON list of choices, or Lark."""

    kind: Literal["json", "regex", "choice", "lark"]
    text: str

    def compiled(self) -> str:
        """The grammar for llguidance. Raises UsageError for one that it cannot express."""
        from llguidance import LLMatcher

        try:
            if self.kind == "json":
                return str(LLMatcher.grammar_from_json_schema(self.text))
            if self.kind == "regex":
                return str(LLMatcher.grammar_from_regex(self.text))
            if self.kind == "choice":
                return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(self.text)))))
            return str(LLMatcher.grammar_from_lark(self.text))
        except ValueError as error:
            raise UsageError(f"the {self.kind} constraint cannot be used: {error}") from None


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
        self._tokenizer = _tokenizer(tokenizer_json, vocab_size, tuple(stop_ids))

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the start of a completion. Raises UsageError for a constraint that cannot be used."""
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
