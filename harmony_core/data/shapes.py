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
    Said,
    calls_in,
    from_json,
    json_type,
    read_messages,
    text_fragment,
    text_of,
    weight_of,
)
from harmony_core.errors import DataError, HarmonyError, did_you_mean
from harmony_core.text.fragments import Reasoning, Text
from harmony_core.text.threads import StringThread, Turn, fragment_turn

_SHAPES = {"prompt": "prompt/completion", "instruction": "Alpaca"}
_ANSWERS_OF_PROMPTS = ("completion", "response", "output", "assistant")
"""Beside a prompt, `answer` and `solution` are usually a grader's reference: they stay metadata."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")
_TEMPLATED = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<\|user\|>|<\|system\|>|<start_of_turn>|<bos>|<s>|"
    r"\[INST\]|### ?(Human|Instruction|User|System)|Below is an instruction|(USER|Human|User|SYSTEM): )"
)


def answered(talk: list[Said]) -> bool:
    """Whether the assistant has the last word."""
    return bool(talk) and talk[-1].turn.role == "assistant"


def conversation(row: Row, with_answer: bool) -> tuple[str, list[Said]]:
    """The row's shape in words, and its turns; without those of the columns that answer unless `with_answer`.

    Raises DataError for a row of no shape that is read.
    """
    columns = row.reading.columns
    if (name := _messages_column(row)) is not None:
        raw = row.line[name]
        row.taken.add(name)
        talk = read_messages(raw, name, row.reading.roles)
        shape = "ShareGPT" if isinstance(raw[0], Mapping) and "from" in raw[0] else "messages"
        among: tuple[str, ...] = ("completion",) if answered(talk) else ("completion", "output", "response")
    elif (user := row.name("user")) is not None:
        if not columns.get("user") and not columns.get("assistant"):
            refuse_foreign(row.line, answered=True)
        talk, shape = _asked(row, user), _SHAPES.get(user, "question/answer")
        among = _ANSWERS_OF_PROMPTS if user == "prompt" else tuple(n for n in FIELDS["assistant"] if n != user)
    elif (name := row.name("text")) is not None:
        refuse_foreign(row.line, answered=True)
        talk = said_in(row.text("text"), name, "assistant" if with_answer else "user")
        shape, among = "plain text", ()
    else:
        refuse_unknown(row.line)
    if with_answer and (among or columns.get("assistant")):
        _add_answer(row, talk, among)
    return shape, with_system(row, talk)


def with_system(row: Row, talk: list[Said]) -> list[Said]:
    """The turns behind the system prompt of a column. Raises DataError where they begin with another one."""
    text = row.text("system")
    if not text or (talk and talk[0].turn.role == "system" and talk[0].turn.text == text):
        return talk
    if talk and talk[0].turn.role == "system":
        raise DataError("has a system prompt in a column and another one among its messages")
    return [Said(Turn("system", (text_fragment(text, "system"),), 0.0)), *talk]


def said_in(text: str, name: str, role: str) -> list[Said]:
    """A text as one turn, or as those of a transcript of Anthropic's. Raises DataError for template markers."""
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) > 1 and not pieces[0].strip():
        spoken = zip(pieces[1::2], pieces[2::2], strict=True)
        talk = [Said(Turn(_SPEAKERS[who], (text_fragment(said, name),), 0.0)) for who, said in spoken]
        return talk[:-1] if answered(talk) and not talk[-1].turn.text.strip() else talk
    if _TEMPLATED.match(text):
        raise DataError(f"'{name}' is written with a chat template's markers: write it as 'messages' without them")
    return [Said(Turn(role, (text_fragment(text, name),), 0.0))]


def answer_in(value: Any, name: str, roles: Mapping[str, str]) -> list[Said]:
    """An answer as text, fragments, a message, or a list of messages; no turns for an empty value. Raises DataError."""
    if value in ("", [], {}):
        return []
    first = value[0] if isinstance(value, list) else None
    if isinstance(value, dict) or (isinstance(first, str) and len(value) == 2):
        talk = read_messages([value], name, roles)
    elif isinstance(first, dict) and ("role" in first or "from" in first):
        talk = read_messages(value, name, roles)
    elif isinstance(value, str):
        talk = [Said(Turn("assistant", (text_fragment(value, name),), 0.0))]
    elif isinstance(first, dict):
        try:
            talk = [Said(fragment_turn("assistant", value))]
        except HarmonyError as error:
            raise DataError(f"'{name}': {error.message}") from None
    else:
        raise DataError(f"'{name}' must be text or a list of messages, not {json_type(value)}")
    if not answered(talk):
        raise DataError(f"'{name}' must end with the assistant's turn")
    return talk


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


def _asked(row: Row, user: str) -> list[Said]:
    """The turns of a question in columns: earlier ones, then the question with its context below it."""
    talk: list[Said] = []
    if (history := row.name("history")) is not None:
        pairs = unpacked(row.take(history), history, sure=True)
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise DataError(f"'{history}' must be a list of [question, answer]")
        talk = read_messages([{"user": asked, "assistant": answer} for asked, answer in pairs], history, {})
    question = said_in(text_of(row.take(user), user), user, "user")
    context = row.name("context", tuple(name for name in FIELDS["context"] if name != user))
    below = text_of(row.take(context), context) if context is not None else ""
    if below:
        text = "\n\n".join(part for part in (question[-1].turn.text, below) if part)
        question[-1] = Said(Turn("user", (text_fragment(text, user),), 0.0))
    return talk + question


def _add_answer(row: Row, talk: list[Said], among: tuple[str, ...]) -> None:
    """Append the answer of a column: text, messages, or with `tools` the calls in `answers`."""
    name = row.name("assistant", among)
    if name is not None:
        answer = answer_in(row.take(name), name, row.reading.roles)
        if len(answer) == 1 and (thought := row.text("reasoning")):
            turn = answer[0].turn
            answer = [answer[0]._replace(turn=Turn(turn.role, (Reasoning(thought), *turn.fragments), 0.0))]
        talk += answer
    elif not answered(talk) and row.line.get("answers") and row.get("tools"):
        talk.append(Said(Turn("assistant", tuple(calls_in(row.take("answers"), "answers")), 0.0)))


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
    if pair and reading.kind != "prompts" and not any(row.name(what) for what in ("messages", "user", "text")):
        refuse_unanswered(line, pair)
    implied = _split(_sides(row)) if pair and reading.kind == "prompts" else []
    row.taken.clear()  # of a pair the answers are metadata here
    found = ("preference", with_system(row, implied)) if implied else conversation(row, reading.kind != "prompts")
    shape, talk = found
    kind: Format = reading.kind or ("feedbacks" if row.get("feedbacks") else "completions")
    if reading.kind is None and kind == "completions" and not answered(talk):
        refuse_foreign(line)
        kind = "prompts"
    if kind == "prompts":
        thread = _prompt(row, talk)
    elif answered(talk):
        thread = _thread(row, talk, _scale(row, kind))
    else:
        refuse_unanswered(line, pair)
    if reading.feedback_key is not None:
        thread.metadata["res"] = _feedback(row, reading.feedback_key)
    elif kind == "feedbacks" and not isinstance(scalar(row.get("label")), bool) and not row.object("feedbacks"):
        raise DataError("has no 'feedbacks' (or 'metrics'), and no feedback_key names a column that is one")
    return ReadRow(thread, shape, kind)


def thread_of(talk: list[Said], scale: float, metadata: Line) -> StringThread:
    """The thread of turns; the fields of their messages that were not read become `metadata["message_fields"]`.

    The last turn's weight is `scale`. If a message sets its own weight, that is multiplied by `scale`, and all other
    assistant turns have the weight `scale`, too.
    """
    marked = any(said.mark is not None for said in talk)
    if any(said.unread for said in talk):
        metadata["message_fields"] = [said.unread for said in talk]
    turns, last = [], len(talk) - 1
    for index, (turn, mark, _) in enumerate(talk):
        own = (index == last or (marked and turn.role == "assistant")) if mark is None else mark
        turns.append(Turn(turn.role, turn.fragments, scale * own) if own and scale else turn)
    return StringThread.from_turns(turns, metadata)


def _thread(row: Row, talk: list[Said], scale: float) -> StringThread:
    kwargs = row.object("template_kwargs")
    if tools := _tools(row):
        kwargs = {**kwargs, "tools": tools}
    thread = thread_of(talk, scale, row.metadata())
    return thread.with_template_kwargs(**kwargs) if kwargs else thread


def _prompt(row: Row, talk: list[Said]) -> StringThread:
    """Without the assistant's last turns; the last one's text is kept as `metadata["completion"]`.

    Where that is not all that they hold, `metadata["completion_turns"]` has their messages.
    """
    count = len(talk)
    while count and talk[count - 1].turn.role == "assistant":
        count -= 1
    if not count:
        raise DataError("has assistant messages only, so that no prompt is left")
    thread = _thread(row, talk[:count], 0.0)
    if cut := talk[count:]:
        text, parts = cut[-1].turn.text, [part for said in cut for part in said.turn.fragments]
        whole = len(cut) == 1 and not cut[0].unread and all(isinstance(part, Text) for part in parts)
        if thread.metadata.setdefault("completion", text) != text or not whole:
            thread.metadata["completion_turns"] = [
                {"role": "assistant", "content": [part.public() for part in said.turn.fragments]} | said.unread
                for said in cut
            ]
    return thread


def _scale(row: Row, kind: Format) -> float:
    """The row's weight; 0 for a completion whose label is false."""
    if kind == "completions" and scalar(row.get("label")) is False:
        return 0.0
    value = scalar(row.get("weight"))
    return (weight_of({"weight": value}) or 0.0) if isinstance(value, int | float) else 1.0


def _feedback(row: Row, key: str) -> float | bool:
    """The value of a feedback, or of a column that is one."""
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
    talk = with_system(row, prompt) if prompt else conversation(row, with_answer=False)[1]
    if answered(talk):
        raise DataError("its prompt ends with the assistant's turn, before the two completions")
    if _scale(row, "preference") != 1:
        raise DataError("has a weight, which a pair cannot have")
    if any(said.unread for side in sides.values() for said in side):
        row.taken -= sides.keys()
    thread = _thread(row, talk, 0.0)
    thread.metadata |= {"preferred_completion": answers[0], "other_completion": answers[1]}
    return ReadRow(thread, "preference", "preference")


def _sides(row: Row) -> dict[str, list[Said]]:
    """The turns of both completions by their columns."""
    sides = {}
    for what in ("chosen", "rejected"):
        name = row.name(what)
        if name is None:
            raise DataError(f"has no '{what}' (or '{FIELDS[what][1]}'): a pair needs 'chosen' and 'rejected'")
        value = row.take(name)
        side = said_in(value, name, "assistant") if isinstance(value, str) and value else []
        sides[name] = side or answer_in(value, name, row.reading.roles)
    if not all(sides.values()):
        raise DataError("both completions must be text that is not empty")
    return sides


def _split(sides: dict[str, list[Said]]) -> list[Said]:
    """The common prompt of two whole conversations; empty if the columns hold answers only."""
    chosen, other = sides.values()
    same = [said.turn for said in chosen[:-1]] == [said.turn for said in other[:-1]]
    if not same or not answered(chosen) or not answered(other):
        raise DataError("'chosen' and 'rejected' must differ in the assistant's last turn alone")
    return chosen[:-1]


def _answer_text(said: Said, name: str) -> str:
    if said.mark not in (None, 1.0) or not all(isinstance(part, Text) for part in said.turn.fragments):
        raise DataError(f"'{name}' has a weight, a call or a thought: a pair is of two texts")
    if not said.turn.text:
        raise DataError("both completions must be text that is not empty")
    return said.turn.text
