"""Shapes of rows: what rows of public datasets become, from every kind of file; that nothing of a row is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dataset_table import PAGE, WRITERS, outcome, page_with_table
from docs_blocks import blocks_in
from harmony_core.data.columns import FIELDS, Reading
from harmony_core.data.datasets import load_threads
from harmony_core.data.shapes import ReadRow, read_row
from harmony_core.errors import DataError
from harmony_core.text.chat_template import ChatTemplate
from harmony_core.text.marking import all_messages
from harmony_core.text.threads import StringThread
from harmony_core.text.turns import FunctionCall, Reasoning, Text, ToolResponse
from public_rows import CALL, EXAMPLES, TOOL, A, Example, Q, Row, said

ids = [example.name for example in EXAMPLES]


def read(row: Row, **reading: Any) -> ReadRow:
    return read_row(json.loads(json.dumps(row)), Reading(**reading))


def refusal(row: Row, **reading: Any) -> str:
    with pytest.raises(DataError) as error:
        read(row, **reading)
    return error.value.message


@pytest.mark.parametrize("example", EXAMPLES, ids=ids)
def test_rows_of_public_datasets(example: Example) -> None:
    options = {"kind": example.kind, "columns": example.columns, "roles": example.roles}
    if example.refused:
        assert example.refused in refusal(example.row, **options)
        return
    found = read(example.row, **options)
    assert [(turn.role, turn.text, turn.weight) for turn in found.thread.turns] == example.turns
    assert found.shape == (example.shape or found.shape)
    assert example.metadata is None or found.thread.metadata == example.metadata


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("rows.jsonl", "rows.csv")])
def test_every_kind_of_file_gives_the_same(name: str, tmp_path: Path) -> None:
    for example in EXAMPLES:
        assert outcome(example, tmp_path, name) == outcome(example, tmp_path, "rows.jsonl"), example.name


def test_the_table_of_shapes_is_what_is_read() -> None:
    assert PAGE.read_text("utf-8") == page_with_table(), "python tests/dataset_table.py"


def test_the_examples_of_the_page_are_read(tmp_path: Path) -> None:
    page = PAGE.read_text("utf-8")
    examples = [block for block in blocks_in(page, "datasets") if "shape" in block.notes]
    assert len(examples) == 11
    for block in examples:
        for line in block.body.splitlines():
            (tmp_path / "rows.jsonl").write_text(line)
            assert read(json.loads(line)).kind == block.notes["shape"], line
            assert len(load_threads(tmp_path / "rows.jsonl")) == 1
    keys = page.partition("<!-- keys of columns -->\n")[2].partition("\n\n")[0]
    assert keys.replace("`", "").rstrip(".").replace(",\n", ", ").split(", ") == list(FIELDS)


def test_tool_calls_become_fragments_and_definitions_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": json.dumps(CALL["arguments"])}}
    messages = [
        *said(Q),
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "rain", "content": "yes"},
        {"role": "assistant", "content": "It rains.", "thinking": "So it does.", "tool_calls": []},
    ]
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        thread = read({"messages": messages, "tools": tools}).thread
        assert [turn.fragments for turn in thread.turns[1:]] == [
            (Reasoning("Ask."), FunctionCall("c1", "rain", '{"city": "Oslo"}')),
            (ToolResponse("c1", "yes", "rain"),),
            (Reasoning("So it does."), Text("It rains.")),
        ]
        assert thread.template_kwargs["tools"] == [TOOL] and thread.metadata["tools"] == tools
        assert "message_fields" not in thread.metadata
    template = ChatTemplate(
        "{{ tools[0].function.name }} {{ messages[1].tool_calls[0].function.arguments.city }}", "t", {}
    )
    rendered = template.with_variables(thread.template_kwargs).render(all_messages(thread.turns))
    assert rendered.text == "rain Oslo"
    without = read({"messages": messages, "tools": []}).thread
    assert not without.template_kwargs and without.metadata["tools"] == []


@pytest.mark.parametrize("ids", [("c1", "c2"), ("", "c2"), ("", "")])
def test_the_ids_of_calls_and_names_of_tools_reach_the_template_and_only_those(ids: tuple[str, str]) -> None:
    calls = [
        ({"id": id} if id else {}) | {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
        for id in ids
    ]
    answers = [{"role": "tool", "content": "yes"} | ({"tool_call_id": id, "name": "rain"} if id else {}) for id in ids]
    messages = [*said(Q), {"role": "assistant", "content": "", "tool_calls": calls}, *answers, *said(A)]
    thread = read({"messages": messages}).thread
    assert all_messages(thread.turns) == messages
    assert all_messages(StringThread.from_json(thread.to_json()).turns) == messages


def test_template_variables_of_a_row() -> None:
    row = {"messages": said(Q, A), "chat_template_kwargs": {"enable_thinking": False}}
    thread = read(row).thread
    assert thread.template_kwargs == {"enable_thinking": False}
    assert thread.metadata == {"chat_template_kwargs": {"enable_thinking": False}}


def test_calls_in_other_forms() -> None:
    expected = [FunctionCall("", "rain", '{"city": "Oslo"}')]
    for message in (
        {"role": "assistant", "function_call": CALL},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"function": CALL}])},
        {"from": "function_call", "value": json.dumps(CALL)},
    ):
        assert (
            list(read({"conversations": [{"from": "human", "value": "?"}, message]}).thread.turns[1].fragments)
            == expected
        )
    assert "must be a call as JSON" in refusal({"conversations": [{"from": "function_call", "value": "rain()"}]})
    answers = {"query": "?", "answers": json.dumps([CALL, CALL]), "tools": [TOOL]}
    assert read(answers).thread.turns[1].fragments == (*expected, *expected)


def weights(*messages: Row, **row: Any) -> list[float]:
    return read({"messages": [*said(Q), *messages], **row}).thread.get_turn_weights()


def test_weights_that_rows_and_messages_say() -> None:
    answer = {"role": "assistant", "content": "4"}
    assert weights(answer, *said(Q), answer) == [0, 0, 0, 1]
    assert weights(answer | {"weight": 0}, *said(Q), answer | {"weight": 1}) == [0, 0, 0, 1]
    assert weights(answer, *said(Q), answer | {"train": False}) == [0, 1, 0, 0]
    assert weights(answer | {"loss_weight": 0.5}) == [0, 0.5] and weights(answer, loss_weight=0.5) == [0, 0.5]
    assert weights(answer, train=False) == [0, 0] and weights(answer, weight="0") == [0, 0]
    assert weights(answer, label="False") == [0, 0] and weights(answer, label="spam") == [0, 1]
    assert weights(answer | {"weight": None}, label=1) == [0, 1]
    for bad in ({"weight": -1}, {"weight": "1"}, {"train": 2}, {"loss": 0.3}, {"mask": True}, {"train_detail": [1]}):
        assert f"'messages[1].{next(iter(bad))}'" in refusal({"messages": [*said(Q), answer | bad]})
    assert "a pair cannot have" in refusal({"prompt": "a", "chosen": "b", "rejected": "c", "train": False})
    kto = {"prompt": "2+2?", "completion": "5", "label": False}
    found = read(kto, kind="feedbacks", feedback_key="label")
    assert found.thread.get_turn_weights() == [0, 1] and found.thread.metadata == {"label": False, "res": False}


def test_a_system_prompt_in_a_column_and_in_the_messages() -> None:
    row = {"messages": said(("system", "Be brief."), Q, A), "system": "Be brief."}
    assert len(read(row).thread.turns) == 3
    assert "another one among its messages" in refusal(row | {"system": "Be long."})


def test_pairs_that_are_none() -> None:
    other = ("assistant", "5")
    assert "last turn alone" in refusal({"chosen": said(Q, A), "rejected": said(("user", "?"), other)})
    called = [*said(Q), {"role": "assistant", "tool_calls": [CALL]}]
    assert "a pair is of two texts" in refusal({"chosen": called, "rejected": said(Q, other)})
    assert "prompt ends with the assistant's turn" in refusal({"prompt": said(Q, A), "chosen": "a", "rejected": "b"})


def test_what_python_prints_is_told_from_json() -> None:
    assert "write it as JSON (json.dumps)" in refusal({"messages": str(said(Q, A))})


def test_images_in_a_column_that_is_nothing_special() -> None:
    row = {"messages": said(Q, A), "image": "none"}
    assert "read text only" in refusal(row)
    assert read(row, columns={"media": None}).thread.metadata == {"image": "none"}
    assert read({"messages": said(Q, ("assistant", "a <image> tag"))}).kind == "completions"


TEXTS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def random_row(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    """A row of a random shape in which every text is another one."""
    words = iter(f"{rng.choice(TEXTS)}{number}" for number in range(1000))
    roles = [*(["system"] if rng.random() < 0.3 else []), *["user", "assistant"] * rng.randint(1, 3)]
    talk = [{"role": role, "content": next(words)} for role in roles]
    shape = rng.randrange(7)
    if shape == 0:
        row: Row = {"messages": talk}
    elif shape == 1:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]}
    elif shape == 2:
        row = {"instruction": next(words), "input": next(words), "output": next(words)}
    elif shape == 3:
        row = {"prompt": talk[:-1], "chosen": [talk[-1]], "rejected": [{"role": "assistant", "content": next(words)}]}
    elif shape == 4:
        row = {"chosen": talk, "rejected": [*talk[:-1], {"role": "assistant", "content": next(words)}]}
    elif shape == 5:
        row = {
            rng.choice(["question", "problem", "prompt"]): next(words),
            "response": next(words),
            "label": rng.random() < 0.5,
        }
    else:
        row = {"text": next(words)}
    for message in talk:
        if rng.random() < 0.3:
            name, value = rng.choice(
                [
                    ("weight", rng.choice([0, 1, None])),
                    ("reasoning_content", next(words)),
                    ("name", next(words)),
                    ("tool_calls", [{"name": next(words), "arguments": {"a": next(words)}}]),
                    ("odd", {"deep": [next(words)]}),
                ]
            )
            message.setdefault(name, value)
    for name in rng.sample(
        ["answer", "source", "system_prompt", "topic", "reasoning", "metadata", "tools", "context", "ID"], 2
    ):
        row.setdefault(name, {"inner": next(words)} if name == "metadata" else next(words))
    return row, {"kind": rng.choice([None, None, "prompts", "completions", "preference"])}


def texts_in(value: Any) -> set[str]:
    """Every text of ours below a value."""
    found = set(json.dumps(value).replace('\\"', '"').replace("\\n", '"').split('"'))
    return {text for text in found if text.rstrip("0123456789") in TEXTS}


def test_random_rows_are_read_whole_or_refused() -> None:
    rng, read_rows = random.Random(7), 0
    for _ in range(4000):
        row, reading = random_row(rng)
        try:
            thread = read(row, **reading).thread
        except DataError as error:
            assert error.message and not texts_in(row) & texts_in(error.message)
            continue
        read_rows += 1
        held = texts_in([json.loads(thread.to_json()), thread.metadata])
        assert texts_in(row) <= held, (row, reading)
    assert read_rows > 1500
