"""Tokens as text, with a tokenizer whose characters are longer than its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from harmony_core.algorithms.rollout import pieces_of, show_sample, token_texts
from harmony_core.journal import Piece, kept
from harmony_core.text.threads import TokenizedThread
from harmony_core.text.turns import GenerationRecord, Text, TokenTurn


class Bytes:
    """Stands for a model: a token is a byte, and the first token of a text loses its leading space."""

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace").removeprefix(" ")


def texts(text: str) -> list[str]:
    return asyncio.run(token_texts(Bytes(), list(text.encode())))  # type: ignore[arg-type]


def test_tokens_join_to_the_text() -> None:
    assert texts("a b") == ["a", " ", "b"]
    assert texts("é😀!") == ["", "é", "", "", "", "😀", "!"]
    assert texts("") == []


def test_a_cut_character_stays_visible() -> None:
    assert asyncio.run(token_texts(Bytes(), list("a😀".encode())[:-2])) == ["a", "", "\ufffd"]  # type: ignore[arg-type]


def test_the_generated_turn_is_told_by_token() -> None:
    record = GenerationRecord((-0.5, -0.25), (-0.5, -0.25), (0, 0), "stop", "policy")
    said = TokenTurn("assistant", (Text("ok"),), 1.0, 2, 4, generation=record)
    thread = TokenizedThread(list(b"hiok"), [TokenTurn("user", (Text("hi"),), 0.0, 0, 2), said])
    pieces: list[Any] = asyncio.run(pieces_of(Bytes(), thread))  # type: ignore[arg-type]
    assert pieces == [("user", [Piece("hi")]), ("assistant", [Piece("o", 1.0, -0.5), Piece("k", 1.0, -0.25)])]
    events: list[dict[str, Any]] = []
    with kept(lambda type, data: events.append(data)):
        asyncio.run(show_sample(Bytes(), thread, 4, source="rollout", reward=0.5))  # type: ignore[arg-type]
    assert (events[0]["step"], events[0]["reward"], events[0]["turns"][1]["pieces"][1]) == (4, 0.5, ["k", 1.0, -0.25])
