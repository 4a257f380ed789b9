"""What is trained under published chat templates: what transformers renders, or nothing, for a reason that is told."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

import public_templates as public
import tokenizer_directories as directories
from harmony_core.errors import TokenizationError
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.turns import AnyFragment, FunctionCall, Reasoning, Text, ToolResponse, Turn
from public_templates import CONVERSATIONS, Message, Oracle
from source_tree import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "templates.md"
BEGIN, END = "<!-- table: tests/text/test_public_templates.py -->\n", "<!-- end of table -->\n"

REASONS = {
    "leaves out its thought": "t",
    "leaves out its text": "w",
    "leaves out its call": "c",
    "leaves out the text of turn": "o",
    "has no prompt for it": "p",
    "prompt for it is not what": "p",
    "writes no end-of-turn token": "e",
    "writes an end-of-turn token before": "e",
    "rewrites": "r",
    "cuts or looks into": "r",
}


def thread_of(messages: list[Message], variables: dict[str, Any]) -> StringThread:
    """The conversation in our form, every assistant turn weighted."""
    turns = []
    for message in messages:
        parts: list[AnyFragment] = []
        if "reasoning_content" in message:
            parts.append(Reasoning(message["reasoning_content"]))
        if message["role"] == "tool":
            parts.append(ToolResponse(message["tool_call_id"], message["content"], message.get("name")))
        elif message["content"]:
            parts.append(Text(message["content"]))
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"])
            parts.append(FunctionCall(call["id"], call["function"]["name"], arguments))
        turns.append(Turn(message["role"], tuple(parts), 0.0))
    return StringThread.from_turns(turns, None, None, variables).with_weight_all_assistant_turns()


def renders(oracle: Oracle, messages: list[Message]) -> bool:
    """Whether transformers renders the conversation, and the prompt of each of its answers."""
    try:
        oracle.render(messages)
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                oracle.prove(messages[: at + 1])
    except Exception:  # whatever a template raises is its refusal
        return False
    return True


def check_part(oracle: Oracle, part: TokenizedThread, messages: list[Message]) -> None:
    """Every weighted turn stands behind the tokens of transformers' prompt for it, and all of it is there."""
    shown = oracle.render(messages[: len(part.token_turns)])
    for at, turn in enumerate(part.token_turns):
        if not turn.weight:
            continue
        prompt = oracle.render(messages[:at], prompt=True)
        trained = part.token_ids[turn.start : turn.end]
        assert part.token_ids[: turn.start] == oracle.ids(prompt)
        proof = oracle.prove(messages[: at + 1])
        if trained == proof.emitted:
            continue
        # As it stands in the whole conversation, or with tokens of its own where the first would reach into the prompt.
        text = oracle.theirs.decode(trained, skip_special_tokens=False)
        assert shown.startswith(prompt + text) and trained[-1] in oracle.ends
        assert proof.problem == "tokens" or len(part.token_turns) > at + 1
        assert all(public.is_in(leaf, text, prompt) for leaf in public.leaves(messages[at]))


def cell(oracle: Oracle, ours: ChatTokenizer, messages: list[Message]) -> str:
    """How a conversation is trained: `+` whole, a number of parts, the letter of a reason, or `-` if not rendered."""
    thread = thread_of(messages, oracle.variables)
    if not renders(oracle, messages):
        with pytest.raises(TokenizationError):
            ours.parts(thread)
        return "-"
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        parts = ours.parts(thread)
    except TokenizationError as error:
        letter = next((letter for words, letter in REASONS.items() if words in error.message), None)
        assert letter is not None, error.message
        assert letter == "o" or any(oracle.prove(messages[: at + 1]).problem for at in answers), error.message
        return letter
    assert sorted(at for part in parts for at, turn in enumerate(part.token_turns) if turn.weight) == answers
    for part in parts:
        check_part(oracle, part, messages)
    if len(parts) > 1:
        with pytest.raises(TokenizationError, match="cannot be trained"):
            ours.tokenize(thread)
        return str(len(parts))
    assert ours.tokenize(thread).token_ids == parts[0].token_ids
    return "+"


@functools.cache
def inner() -> str:
    return str(directories.byte_level().to_str())


def row(root: Path, name: str, source: str) -> str:
    """A template's row of the table."""
    try:
        oracle = Oracle(root / name, name, source, inner())
    except Exception:  # whatever a template raises: transformers does not render a plain answer
        return "-" * len(CONVERSATIONS)
    try:
        ours = ChatTokenizer.load(root / name)
    except TokenizationError:
        return "l" * len(CONVERSATIONS)
    return "".join(cell(oracle, ours, messages) for messages in CONVERSATIONS.values())


def test_what_is_trained_under_published_templates_is_what_transformers_renders(tmp_path: Path) -> None:
    rows = {name: row(tmp_path, name, source) for name, source in sorted(public.fetch().items())}
    assert len(rows) == public.COUNT
    head = f"| template | {' | '.join(map(str, range(1, len(CONVERSATIONS) + 1)))} |\n"
    rule = "| --- |" + " --- |" * len(CONVERSATIONS) + "\n"
    table = head + rule + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("WRITE_TEMPLATE_TABLE"):
        PAGE.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    else:
        assert written == table, "WRITE_TEMPLATE_TABLE=1 writes it anew"
