"""The columns of a row: the names under which each field is looked for, and the columns left for the metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from harmony_core.data import Format
from harmony_core.data.messages import ANSWER_NAMES, MEDIA_NAMES, USER_NAMES, from_json, json_type, text_of
from harmony_core.errors import DataError, UsageError, did_you_mean

Line = dict[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("input", "messages", "conversations", "conversation", "dialogue", "dialog", "chat", "prompt"),
    "user": USER_NAMES,
    "context": ("context", "input"),
    "history": ("history",),
    "assistant": ANSWER_NAMES,
    "reasoning": ("reasoning_content", "thinking"),
    "system": ("system", "system_prompt"),
    "text": ("text",),
    "chosen": ("chosen", "preferred_completion", "good_completion"),
    "rejected": ("rejected", "other_completion", "bad_completion"),
    "label": ("label", "kto_tag"),
    "feedbacks": ("feedbacks", "metrics"),
    "weight": ("weight", "loss_weight", "train"),
    "tools": ("tools", "functions"),
    "template_kwargs": ("chat_template_kwargs",),
    "media": MEDIA_NAMES,
    "metadata": ("metadata",),
}
"""The fields of a row (the keys of `columns`), each with its usual column names in order of preference."""

Projection = dict[str, tuple[tuple[str, str], ...]]
"""For each of `FIELDS`, pairs of a usual name and the row's column; a mapped column is paired with the field's name."""

_MAX_PLANS = 1000
_PLATFORM = {"id", "created_at", "model_id", "external_data", "labels"}


@dataclass(frozen=True)
class Reading:
    """How rows are read: the kind that all must have, the meaning of columns and roles, the value used as feedback."""

    kind: Format | None = None
    feedback_key: str | None = None
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    _plans: dict[tuple[str, ...], Projection] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def plan(self, line: Line) -> Projection:
        """The columns of a row in which each field may be. Raises DataError if one of `columns` is missing."""
        names = tuple(line)
        if names not in self._plans:
            if len(self._plans) > _MAX_PLANS:
                self._plans.clear()
            self._plans[names] = self._made(names)
        return self._plans[names]

    def _made(self, names: tuple[str, ...]) -> Projection:
        for field, wanted in self.columns.items():
            if wanted is not None and wanted not in names:
                raise DataError(f"has no column '{wanted}' for '{field}'; {did_you_mean(wanted, names)}")
        by_known = {name.lower(): name for name in names} | {name: name for name in names}
        mapped = set(self.columns.values())
        plan: Projection = {}
        for field, usual in FIELDS.items():
            pairs = [(known, by_known[known]) for known in usual if known in by_known]
            plan[field] = tuple((known, name) for known, name in pairs if name not in mapped)
            if field in self.columns:
                plan[field] = tuple((field, chosen) for chosen in [self.columns[field]] if chosen is not None)
        return plan


def check_columns(columns: Mapping[str, str | None]) -> None:
    """Raise UsageError for a key that is not in `FIELDS`."""
    if unknown := columns.keys() - FIELDS.keys():
        raise UsageError(f"columns: there is no '{min(unknown)}'", hint=f"there is: {', '.join(FIELDS)}")


class Row:
    """Looks up columns, by the reading's `columns` or by their usual names, and remembers the columns taken."""

    def __init__(self, line: Line, reading: Reading) -> None:
        self.line = line
        self.reading = reading
        self.plan = reading.plan(line)
        self.taken: set[str] = set()

    def name(self, field: str, among: tuple[str, ...] | None = None) -> str | None:
        """The field's first column that is not null: the mapped one, or one with a usual name (in `among` if given)."""
        usual = [name for known, name in self.plan[field] if among is None or known in among or known == field]
        return next((name for name in usual if self.line[name] is not None), None)

    def get(self, field: str) -> Any:
        """The field's value, or None."""
        name = self.name(field)
        return None if name is None else self.line[name]

    def take(self, name: str) -> Any:
        """Return a column's value and exclude the column from the metadata. JSON text of messages is decoded."""
        self.taken.add(name)
        return unpacked(self.line[name], name)

    def text(self, field: str) -> str:
        """Take a column and return its text; "" for a missing one. Raises DataError for a value that is not text."""
        name = self.name(field)
        return "" if name is None else text_of(self.take(name), name)

    def object(self, field: str) -> Line:
        """The object in a column; {} for a missing one. Raises DataError for a value that is not an object."""
        name = self.name(field)
        return {} if name is None else as_object(self.line[name], name)

    def metadata(self) -> Line:
        """The columns not taken, and the fields of the column `metadata`. Raises DataError for conflicting names."""
        name = self.name("metadata")
        own = self.line[name] if name is not None else None
        if name is None or not isinstance(own, dict):
            return {column: value for column, value in self.line.items() if column not in self.taken}
        if {"id", "created_at"} <= own.keys() <= _PLATFORM:
            labels = {"labels": own["labels"]} if own.get("labels") else {}
            own = as_object(own.get("external_data"), "metadata.external_data") | labels
        rest = {c: value for c, value in self.line.items() if c not in self.taken and c != name}
        if twice := [c for c in rest.keys() & own.keys() if rest[c] != own[c]]:
            raise DataError(f"'{min(twice)}' is a column and stands in '{name}' with another value: rename one")
        return own | rest


def unpacked(value: Any, name: str, sure: bool = False) -> Any:
    """Decode a list or object of messages that is stored as JSON text, as in CSV files; return other values unchanged.

    With `sure`, every list and object is decoded. Raises DataError for a list in Python's notation.
    """
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    head = value[:200]
    if not sure and not any(key in head for key in ('"role"', '"from"', "'role'", "'from'")):
        return value
    found = from_json(value, value)
    if found is value and ("{'" in head or "['" in head):
        raise DataError(f"'{name}' is a list as Python prints it: write it as JSON (json.dumps)")
    return found


def as_object(value: Any, name: str) -> Line:
    """An object, decoded if it is JSON text; {} for null. Raises DataError for other values."""
    if isinstance(value, str) and value[:1] == "{":
        value = from_json(value, value)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"'{name}' must be an object, not {json_type(value)}")
    return value or {}


def scalar(value: Any) -> Any:
    """The number or boolean that a text of a CSV file stands for; other values are returned unchanged."""
    if not isinstance(value, str) or len(value) > 30:
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text) if text[:1] in "+-.0123456789" else value
    except ValueError:
        return value


_BETTER = "write the better one as 'chosen' and the other as 'rejected'"
_ROWS = "write one of them as 'completion', or the best as 'chosen' and another as 'rejected'"
_FOREIGN: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("message_id", "parent_id"),
        "messages of a tree (OpenAssistant)",
        "write each path from the root as 'messages'",
    ),
    (("choices",), "multiple choice", "write the choices into the question, and the right one as 'answer'"),
    (("options",), "multiple choice", "write the options into the question, and the right one as 'answer'"),
    (("input_ids",), "token ids", "write the text that they stand for"),
    (("response_j", "response_k"), "two responses", "use columns: {chosen: response_j, rejected: response_k}"),
    (("response_0", "response_1"), "two responses and a verdict", _BETTER),
    (("response1", "response2"), "two responses and a verdict", _BETTER),
    (("response_a", "response_b"), "two responses and a verdict", _BETTER),
    (("answer_0", "answer_1"), "two answers and a verdict", _BETTER),
    (("conversation_a", "conversation_b"), "two conversations and a verdict", _BETTER),
    (("human_ref_A", "human_ref_B"), "two answers and their votes (SHP)", _BETTER),
    (("summaries", "choice"), "two summaries and a verdict", _BETTER),
    (("completions",), "several completions of a prompt", _ROWS),
    (("responses",), "several responses to a prompt", _ROWS),
    (("generations",), "several generations for a prompt", _ROWS),
    (("answers",), "several answers, or places of an answer", "write the one that is right as 'answer'"),
    (("chat",), "a transcript in one text (Glaive)", "split it into 'messages'"),
)
"""Columns that identify an unsupported format, its name and its conversion; the first four also have supported ones."""


def refuse_foreign(line: Mapping[str, Any], answered: bool = False) -> None:
    """Raise DataError for a row of an unsupported format; `answered`: the row seems to have an answer."""
    for columns, format, how in _FOREIGN[:4] if answered else _FOREIGN:
        if all(column in line for column in columns) and any(line[column] is not None for column in columns):
            raise DataError(f"holds {format} ({', '.join(columns)}): {how}")


def refuse_unanswered(line: Mapping[str, Any], pair: bool) -> NoReturn:
    """Raise DataError for a row without an answer to learn."""
    if pair:
        raise DataError(
            "holds a pair (chosen, rejected), which only Dataset[dataset_kinds.Preference] reads; to learn one: "
            "columns: {assistant: chosen}, or {messages: chosen} where it is a whole conversation"
        )
    refuse_foreign(line)
    names = ("completion", "response", "answer", "output")
    if empty := next((name for name in names if line.get(name) in ("", [])), None):
        raise DataError(f"its '{empty}' is empty: there is no answer to learn")
    raise DataError(
        f"has no 'completion' and its last message is not the assistant's{_suggestion(line, names)}{_example(line)}"
    )


def refuse_unknown(line: Mapping[str, Any]) -> NoReturn:
    """Raise DataError for a row of unknown shape."""
    if not line:
        raise DataError("has no columns")
    if "chosen" in line:
        raise DataError("has 'chosen' and 'rejected', and no prompt: texts need a column 'prompt'")
    refuse_foreign(line)
    wanted = ("messages", "conversations", "prompt", "question", "instruction", "text", "chosen", "input")
    names = ", ".join(name[:40] for name in [*line][:12]) + (", ..." if len(line) > 12 else "")
    raise DataError(f"has no shape that is read; its columns: {names}{_suggestion(line, wanted)}{_example(line)}")


def _suggestion(line: Iterable[str], wanted: tuple[str, ...]) -> str:
    """Name a column that looks like a misspelling of a wanted one."""
    unknown = [name for name in line if name not in wanted and len(name) <= 40]
    pairs = [(name, meant) for name in unknown for meant in get_close_matches(name, wanted, 1, 0.8)]
    return f" ('{pairs[0][0]}': did you mean {pairs[0][1]}?)" if pairs else ""


def _example(line: Mapping[str, Any]) -> str:
    """An example of `columns` for this row."""
    texts = [name for name, value in line.items() if isinstance(value, str) and len(name) <= 40]
    example = "; say which column holds what, as in columns: {{user: {}, assistant: {}}}"
    return example.format(*texts) if len(texts) > 1 else ""
