"""The formats of rows: a row of a dataset as a thread, with its shape, its kind, and the weights of its turns.

Columns that become no turn go to the thread's metadata under their names. Error messages never quote a row's content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from harmony_core.data import Format
from harmony_core.data.columns import (
    FIELDS,
    Line,
    Reading,
    Row,
    refuse_foreign,
    refuse_unanswered,
    refuse_unknown,
    scalar,
    unpacked,
)
from harmony_core.data.messages import (
    MEDIA,
    ParsedMessage,
    calls_in,
    from_json,
    json_type,
    read_messages,
    text_fragment,
    text_of,
    weight_of,
)
from harmony_core.errors import DataError, HarmonyError, did_you_mean
from harmony_core.text.threads import StringThread, Turn, fragment_turn
from harmony_core.text.turns import Reasoning, Text

_SHAPES = {"prompt": "prompt/completion", "instruction": "Alpaca"}
_ANSWERS_OF_PROMPTS = ("completion", "response", "output", "assistant")
"""Beside a prompt, `answer` and `solution` are usually a grader's reference: they stay metadata."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")
_TEMPLATED = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<\|user\|>|<\|system\|>|<start_of_turn>|<bos>|<s>|"
    r"\[INST\]|### ?(Human|Instruction|User|System)|Below is an instruction|(USER|Human|User|SYSTEM): )"
)


def answered(messages: list[ParsedMessage]) -> bool:
    """Whether the last message is the assistant's."""
    return bool(messages) and messages[-1].turn.role == "assistant"


def conversation(row: Row, with_answer: bool) -> tuple[str, list[ParsedMessage]]:
    """The row's shape in words, and its turns; the answer's columns are only read if `with_answer`.

    Raises DataError for a row of an unsupported shape.
    """
    columns = row.reading.columns
    if (name := _messages_column(row)) is not None:
        raw = row.line[name]
        row.taken.add(name)
        messages = read_messages(raw, name, row.reading.roles)
        shape = "ShareGPT" if isinstance(raw[0], Mapping) and "from" in raw[0] else "messages"
        among: tuple[str, ...] = ("completion",) if answered(messages) else ("completion", "output", "response")
    elif (user := row.name("user")) is not None:
        if not columns.get("user") and not columns.get("assistant"):
            refuse_foreign(row.line, answered=True)
        messages, shape = _question(row, user), _SHAPES.get(user, "question/answer")
        among = _ANSWERS_OF_PROMPTS if user == "prompt" else tuple(n for n in FIELDS["assistant"] if n != user)
    elif (name := row.name("text")) is not None:
        refuse_foreign(row.line, answered=True)
        messages = messages_in(row.text("text"), name, "assistant" if with_answer else "user")
        shape, among = "plain text", ()
    else:
        refuse_unknown(row.line)
    if with_answer and (among or columns.get("assistant")):
        _add_answer(row, messages, among)
    return shape, with_system(row, messages)


def with_system(row: Row, messages: list[ParsedMessage]) -> list[ParsedMessage]:
    """The turns after the system prompt of a column. Raises DataError if they begin with a different system prompt."""
    text = row.text("system")
    if not text or (messages and messages[0].turn.role == "system" and messages[0].turn.text == text):
        return messages
    if messages and messages[0].turn.role == "system":
        raise DataError("has a system prompt in a column and another one among its messages")
    return [ParsedMessage(Turn("system", (text_fragment(text, "system"),), 0.0)), *messages]


def messages_in(text: str, name: str, role: str) -> list[ParsedMessage]:
    """A text as one turn, or as the turns of an Anthropic transcript. Raises DataError for template markers."""
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) > 1 and not pieces[0].strip():
        spoken = zip(pieces[1::2], pieces[2::2], strict=True)
        messages = [ParsedMessage(Turn(_SPEAKERS[who], (text_fragment(said, name),), 0.0)) for who, said in spoken]
        return messages[:-1] if answered(messages) and not messages[-1].turn.text.strip() else messages
    if _TEMPLATED.match(text):
        raise DataError(f"'{name}' is written with a chat template's markers: write it as 'messages' without them")
    return [ParsedMessage(Turn(role, (text_fragment(text, name),), 0.0))]


def answer_in(value: Any, name: str, roles: Mapping[str, str]) -> list[ParsedMessage]:
    """An answer as text, fragments, a message, or a list of messages; no turns for an empty value. Raises DataError."""
    if value in ("", [], {}):
        return []
    first = value[0] if isinstance(value, list) else None
    if isinstance(value, dict) or (isinstance(first, str) and len(value) == 2):
        messages = read_messages([value], name, roles)
    elif isinstance(first, dict) and ("role" in first or "from" in first):
        messages = read_messages(value, name, roles)
    elif isinstance(value, str):
        messages = [ParsedMessage(Turn("assistant", (text_fragment(value, name),), 0.0))]
    elif isinstance(first, dict):
        try:
            messages = [ParsedMessage(fragment_turn("assistant", value))]
        except HarmonyError as error:
            raise DataError(f"'{name}': {error.message}") from None
    else:
        raise DataError(f"'{name}' must be text or a list of messages, not {json_type(value)}")
    if not answered(messages):
        raise DataError(f"'{name}' must end with the assistant's turn")
    return messages


def _messages_column(row: Row) -> str | None:
    """The column with a list of messages. Raises DataError if a column that must hold one does not."""
    columns = row.reading.columns
    if columns.get("user") and not columns.get("messages"):
        return None
    for known, name in row.plan["messages"]:
        value = unpacked(row.line[name], name, sure=known not in ("input", "prompt"))
        if isinstance(value, list) and value:
            row.line[name] = value
            return name
        sure = known == "conversations" or (known == "messages" and row.name("user") is None)
        if value is not None and ("messages" in columns or sure):
            raise DataError(f"'{name}' must be a list of messages that is not empty")
    return None


def _question(row: Row, user: str) -> list[ParsedMessage]:
    """The turns of a question in columns: earlier ones, then the question with its context below it."""
    messages: list[ParsedMessage] = []
    if (history := row.name("history")) is not None:
        pairs = unpacked(row.take(history), history, sure=True)
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise DataError(f"'{history}' must be a list of [question, answer]")
        messages = read_messages([{"user": asked, "assistant": answer} for asked, answer in pairs], history, {})
    question = messages_in(text_of(row.take(user), user), user, "user")
    context = row.name("context", tuple(name for name in FIELDS["context"] if name != user))
    below = text_of(row.take(context), context) if context is not None else ""
    if below:
        text = "\n\n".join(part for part in (question[-1].turn.text, below) if part)
        question[-1] = ParsedMessage(Turn("user", (text_fragment(text, user),), 0.0))
    return messages + question


def _add_answer(row: Row, messages: list[ParsedMessage], among: tuple[str, ...]) -> None:
    """Append the answer of a column: text, messages, or with `tools` the calls in `answers`."""
    name = row.name("assistant", among)
    if name is not None:
        answer = answer_in(row.take(name), name, row.reading.roles)
        if len(answer) == 1 and (thought := row.text("reasoning")):
            turn = answer[0].turn
            answer = [answer[0]._replace(turn=Turn(turn.role, (Reasoning(thought), *turn.fragments), 0.0))]
        messages += answer
    elif not answered(messages) and row.line.get("answers") and row.get("tools"):
        messages.append(ParsedMessage(Turn("assistant", tuple(calls_in(row.take("answers"), "answers")), 0.0)))


class ReadRow(NamedTuple):
    """A thread, the shape of its row in words, and the row's kind."""

    thread: StringThread
    shape: str
    kind: Format


def read_row(line: Line, reading: Reading) -> ReadRow:
    """The thread of a row, with the weights of its kind. Raises DataError.

    prompts: no weights; completions, feedbacks: the last assistant turn, or the weights that the messages set;
    preference: the prompt without weights, both completions as text in the metadata. A `feedback_key` puts its value
    into `metadata["res"]`.
    """
    row = Row(line, reading)
    if media := next((name for _, name in row.plan["media"] if line[name]), ""):
        raise DataError(f"'{media}' {MEDIA}")
    pair = row.name("chosen") is not None or row.name("rejected") is not None
    if reading.kind == "preference" or (pair and reading.kind is None):
        return _preference(row)
    if pair and reading.kind != "prompts" and not any(row.name(field) for field in ("messages", "user", "text")):
        refuse_unanswered(line, pair)
    implied = _split(_sides(row)) if pair and reading.kind == "prompts" else []
    row.taken.clear()  # the answers of a pair are metadata here
    found = ("preference", with_system(row, implied)) if implied else conversation(row, reading.kind != "prompts")
    shape, messages = found
    kind: Format = reading.kind or ("feedbacks" if row.get("feedbacks") else "completions")
    if reading.kind is None and kind == "completions" and not answered(messages):
        refuse_foreign(line)
        kind = "prompts"
    if kind == "prompts":
        thread = _prompt(row, messages)
    elif answered(messages):
        thread = _thread(row, messages, _scale(row, kind))
    else:
        refuse_unanswered(line, pair)
    if reading.feedback_key is not None:
        thread.metadata["res"] = _feedback(row, reading.feedback_key)
    elif kind == "feedbacks" and not isinstance(scalar(row.get("label")), bool) and not row.object("feedbacks"):
        raise DataError("has no 'feedbacks' (or 'metrics'), and no feedback_key names a column that is one")
    return ReadRow(thread, shape, kind)


def thread_of(messages: list[ParsedMessage], scale: float, metadata: Line) -> StringThread:
    """The thread of turns; the fields of their messages that were not read become `metadata["message_fields"]`.

    The last turn's weight is `scale`. If a message sets its own weight, that is multiplied by `scale`, and all other
    assistant turns have the weight `scale`, too.
    """
    marked = any(parsed.weight is not None for parsed in messages)
    if any(parsed.unread for parsed in messages):
        metadata["message_fields"] = [parsed.unread for parsed in messages]
    weighted, last = [], len(messages) - 1
    for index, (turn, weight, _) in enumerate(messages):
        own = (index == last or (marked and turn.role == "assistant")) if weight is None else weight
        weighted.append(Turn(turn.role, turn.fragments, scale * own) if own and scale else turn)
    return StringThread.from_turns(weighted, metadata)


def _thread(row: Row, messages: list[ParsedMessage], scale: float) -> StringThread:
    kwargs = row.object("template_kwargs")
    if tools := _tools(row):
        kwargs = {**kwargs, "tools": tools}
    thread = thread_of(messages, scale, row.metadata())
    return thread.with_template_kwargs(**kwargs) if kwargs else thread


def _prompt(row: Row, messages: list[ParsedMessage]) -> StringThread:
    """The thread without the assistant's last turns; the text of the last one becomes `metadata["completion"]`.

    If they hold more than this text, `metadata["completion_turns"]` has their messages.
    """
    count = len(messages)
    while count and messages[count - 1].turn.role == "assistant":
        count -= 1
    if not count:
        raise DataError("has assistant messages only, so that no prompt is left")
    thread = _thread(row, messages[:count], 0.0)
    if cut := messages[count:]:
        text, parts = cut[-1].turn.text, [part for parsed in cut for part in parsed.turn.fragments]
        whole = len(cut) == 1 and not cut[0].unread and all(isinstance(part, Text) for part in parts)
        if thread.metadata.setdefault("completion", text) != text or not whole:
            thread.metadata["completion_turns"] = [
                {"role": "assistant", "content": [part.public() for part in parsed.turn.fragments]} | parsed.unread
                for parsed in cut
            ]
    return thread


def _scale(row: Row, kind: Format) -> float:
    """The row's weight; 0 for a completion whose label is false."""
    if kind == "completions" and scalar(row.get("label")) is False:
        return 0.0
    value = scalar(row.get("weight"))
    return (weight_of({"weight": value}) or 0.0) if isinstance(value, int | float) else 1.0


def _feedback(row: Row, key: str) -> float | bool:
    """The value of a feedback, or of a column with this name."""
    feedbacks = row.object("feedbacks")
    named: Mapping[str, Any] = feedbacks if key in feedbacks else row.line
    if key not in named:
        raise DataError(f"has no feedback '{key}': {did_you_mean(key, feedbacks or row.line)}")
    value = scalar(named[key])
    if not isinstance(value, int | float):
        raise DataError(f"feedback '{key}' must be a number or a boolean, not {json_type(value)}")
    return value


def _tools(row: Row) -> list[Line]:
    """Definitions of tools, from a list or its JSON text, in OpenAI's form."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        value = from_json(value, "text")
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(
            f"'{row.name('tools')}' must be a list of function definitions, or its JSON text: columns: {{tools: null}} "
            "leaves it to the metadata"
        )
    return [{"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool for tool in value]


def _preference(row: Row) -> ReadRow:
    sides = _sides(row)
    prompt, answers = _split(sides), [_answer_text(side[-1], name) for name, side in sides.items()]
    messages = with_system(row, prompt) if prompt else conversation(row, with_answer=False)[1]
    if answered(messages):
        raise DataError("its prompt ends with the assistant's turn, before the two completions")
    if _scale(row, "preference") != 1:
        raise DataError("has a weight, which a pair cannot have")
    if any(parsed.unread for side in sides.values() for parsed in side):
        row.taken -= sides.keys()
    thread = _thread(row, messages, 0.0)
    thread.metadata |= {"preferred_completion": answers[0], "other_completion": answers[1]}
    return ReadRow(thread, "preference", "preference")


def _sides(row: Row) -> dict[str, list[ParsedMessage]]:
    """The turns of both completions by their columns."""
    sides = {}
    for field in ("chosen", "rejected"):
        name = row.name(field)
        if name is None:
            raise DataError(f"has no '{field}' (or '{FIELDS[field][1]}'): a pair needs 'chosen' and 'rejected'")
        value = row.take(name)
        side = messages_in(value, name, "assistant") if isinstance(value, str) and value else []
        sides[name] = side or answer_in(value, name, row.reading.roles)
    if not all(sides.values()):
        raise DataError("both completions must be text that is not empty")
    return sides


def _split(sides: dict[str, list[ParsedMessage]]) -> list[ParsedMessage]:
    """The common prompt of two whole conversations; empty if the columns hold answers only."""
    chosen, other = sides.values()
    same = [parsed.turn for parsed in chosen[:-1]] == [parsed.turn for parsed in other[:-1]]
    if not same or not answered(chosen) or not answered(other):
        raise DataError("'chosen' and 'rejected' must differ in the assistant's last turn alone")
    return chosen[:-1]


def _answer_text(parsed: ParsedMessage, name: str) -> str:
    if parsed.weight not in (None, 1.0) or not all(isinstance(part, Text) for part in parsed.turn.fragments):
        raise DataError(f"'{name}' has a weight, a call or a thought: a pair is of two texts")
    if not parsed.turn.text:
        raise DataError("both completions must be text that is not empty")
    return parsed.turn.text
