"""`adaptive datasets inspect`: what is trained, split and refused, and how long rows are."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenizer_directories as directories

Adaptive = Any

ROWS = [
    [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "well \x1b[31m")],
    [("user", "q"), ("assistant", "x" * 60)],
]


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(turns: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_trained_tokens_are_marked_and_rows_counted(adaptive: Adaptive) -> None:
    write("rows.jsonl", [messages(turns) for turns in ROWS[:2]])
    done = adaptive("datasets", "inspect", "rows.jsonl", "--model", "builtin:tiny-lm", "--max-batch-size", "80")
    assert done.code == 0 and "\x1b" not in done.out
    assert "assistant\n{+well <|unk|>[31m<|im_end|>+}\n" in done.out and "{+hello" not in done.out
    assert "--- the first 2 of 2 rows for builtin:tiny-lm\nnone is split or refused\n" in done.out
    assert " too long\n1 longer than max_batch_size=80" in done.out
    found = adaptive("datasets", "inspect", "rows.jsonl", "--model", "builtin:tiny-lm", "--limit", "1", "--json").json
    assert (found["rows"], found["checked"]["rows"], found["too_long"]) == (2, 1, 0)
    (part,) = found["samples"][0]["parts"]
    assert [text for text, weight in part["pieces"] if weight] == ["well <|unk|>[31m<|im_end|>"]
    assert part["trained"] == len("well ?[31m") + 1 and sum(count for *_, count in found["histogram"]) == 1


def test_what_is_split_and_what_is_refused_with_reasons(adaptive: Adaptive, tmp_path: Path) -> None:
    (tmp_path / "qwen3.jinja").write_text(directories.QWEN3)
    template = str(tmp_path / "qwen3.jinja")
    assert adaptive("models", "add", "thinks", "builtin:tiny-lm", "--chat-template", template).code == 0
    thought = "<think>\nhm\n</think>\n\n"
    rows = [[("user", "q"), ("assistant", thought + "one"), ("user", "r"), ("assistant", thought + "two")]] * 2
    lines = [messages(turns) for turns in rows]
    write("rows.jsonl", lines)
    done = adaptive("datasets", "inspect", "rows.jsonl", "--model", "thinks", "--show", "1")
    assert done.code == 0 and "none is split or refused" in done.out
    assert "{+<think>\nhm\n</think>\n\ntwo<|im_end|>+}" in done.out
    write("lost.jsonl", [messages([("user", "q"), ("assistant", "lost<think>b</think>c")]), *lines])
    done = adaptive("datasets", "inspect", "lost.jsonl", "--model", "thinks", "--show", "0")
    assert "1 refused (row 1): " in done.out and "turn 1 (assistant)" in done.out
    found = adaptive("datasets", "inspect", "lost.jsonl", "--model", "thinks", "--json").json
    assert [*found["checked"]["refused"].values()] == [[1]]


def test_template_variables_of_the_key_and_of_the_flag(adaptive: Adaptive, tmp_path: Path) -> None:
    (tmp_path / "says.jinja").write_text("{{ a }}|{{ b }}|" + directories.CHATML)
    assert (
        adaptive("models", "add", "says", "builtin:tiny-lm", "--chat-template", str(tmp_path / "says.jinja")).code == 0
    )
    assert adaptive("models", "set", "says", 'chat_template_kwargs={"a": "key", "b": "key"}').code == 0
    write("rows.jsonl", [messages(ROWS[0])])
    command = ("datasets", "inspect", "rows.jsonl", "--model", "says")
    assert "key|key|<|im_start|>user" in adaptive(*command).out
    assert "key|flag|<|im_start|>user" in adaptive(*command, "--chat-template-kwargs", '{"b": "flag"}').out
    for given, reason in (
        ("{b", "must be a JSON object"),
        ('["b"]', "must be a JSON object"),
        ('{"c": 1}', "read 'c'"),
    ):
        done = adaptive(*command, "--chat-template-kwargs", given)
        assert (done.code, done.out) == (2, "") and reason in done.err


def test_prompts_and_pairs(adaptive: Adaptive) -> None:
    write("prompts.jsonl", [messages([("user", "hi")])])
    found = adaptive("datasets", "inspect", "prompts.jsonl", "--model", "builtin:tiny-lm", "--json").json
    (part,) = found["samples"][0]["parts"]
    assert part["trained"] == 0 and part["pieces"][0][0].endswith("<|im_start|>assistant\n")
    write("pairs.jsonl", [messages([("user", "hi")]) | {"preferred_completion": "yes", "other_completion": "no"}])
    found = adaptive("datasets", "inspect", "pairs.jsonl", "--model", "builtin:tiny-lm", "--json").json
    texts = [[text for text, weight in part["pieces"] if weight] for part in found["samples"][0]["parts"]]
    assert texts == [["yes<|im_end|>"], ["no<|im_end|>"]] and found["checked"]["split"] == 0


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("nothing.jsonl", "--model", "builtin:tiny-lm"), 3, "there is no dataset file nothing.jsonl"),
        (("rows.jsonl", "--model", "builtin:tiny"), 3, "builtin:tiny"),
        (("rows.jsonl",), 2, "--model"),
        (("rows.jsonl", "--model", "builtin:tiny-lm", "--limit", "0"), 2, "limit"),
    ],
)
def test_mistakes(adaptive: Adaptive, words: tuple[str, ...], code: int, reason: str) -> None:
    write("rows.jsonl", [messages(ROWS[1])])
    done = adaptive("datasets", "inspect", *words)
    assert (done.code, done.out) == (code, "") and reason in done.err


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_is_for_terminals(no_color: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(messages(ROWS[1])) + "\n")
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).with_name("adaptive")), "datasets", "inspect", "rows.jsonl"]
    environment = os.environ | {"ADAPTIVE_HOME": str(tmp_path / "home"), "NO_COLOR": no_color}
    done = subprocess.run(
        [*command, "--model", "builtin:tiny-lm"], cwd=tmp_path, env=environment, stdout=theirs, check=True, timeout=120
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert ("\x1b[32mxxx" in shown, "{+xxx" in shown) == (not no_color, bool(no_color))
