"""JSONL datasets: every kind, every bad line by `path:line: reason`; and the shuffled iterator."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmony_core.data import files as dataset_files
from harmony_core.data.datasets import DataSet, convert_sample_dict, load_threads
from harmony_core.errors import DataError, NotFoundError, UsageError
from harmony_core.text.threads import StringThread

META = {"id": "0b0e3b52-6b1c-4d2c-9a4e-6f3b6f0f8a11", "created_at": 1750000000}
ASK = [{"role": "user", "content": "2+2?"}]
PROMPT = {"prompt": [["system", "Be brief."], ["user", "2+2?"]], "metadata": META}
COMPLETION = {
    "prompt": [["user", "2+2?"]],
    "completion": ["assistant", "4"],
    "metadata": META | {"external_data": {"label": "math"}},
}
METRIC = COMPLETION | {"metrics": {"quality": 0.9}}
PREFERENCE = {
    "prompt": [["user", "2+2?"]],
    "good_completion": ["assistant", "4"],
    "bad_completion": ["assistant", "5"],
    "metric": "preference",
    "metadata": META,
}


def write(tmp_path: Path, *lines: Any, name: str = "d.jsonl", end: str = "\n") -> Path:
    path = tmp_path / name
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes(end.join([*texts, ""]).encode())
    return path


def read(tmp_path: Path, *lines: Any, **options: Any) -> list[tuple[list[Any], list[float], Any]]:
    threads = load_threads(write(tmp_path, *lines), **options)
    return [(list(map(tuple, t.get_turns())), t.get_turn_weights(), t.metadata) for t in threads]


def refused(tmp_path: Path, *lines: Any, **options: Any) -> str:
    path = write(tmp_path, *lines)
    with pytest.raises(DataError) as error:
        load_threads(path, **options)
    return error.value.message.replace(str(path), "d")


USER, ANSWER = ("user", "2+2?"), ("assistant", "4")


def test_internal_lines(tmp_path: Path) -> None:
    assert read(tmp_path, PROMPT) == [([("system", "Be brief."), USER], [0, 0], {})]
    assert read(tmp_path, COMPLETION) == [([USER, ANSWER], [0, 1], {"label": "math"})]
    values = {"metrics": {"quality": 0.9}}
    assert read(tmp_path, METRIC) == [([USER, ANSWER], [0, 1], {"label": "math"} | values)]
    assert read(tmp_path, METRIC, feedback_key="quality")[0][2] == {"label": "math", "res": 0.9} | values
    both = {"preferred_completion": "4", "other_completion": "5", "metric": "preference"}
    assert read(tmp_path, PREFERENCE) == [([USER], [0], both)]


def test_internal_lines_of_a_kind(tmp_path: Path) -> None:
    values = {"metrics": {"quality": 0.9}, "label": "math"}
    assert read(tmp_path, METRIC, kind="prompts") == [([USER], [0], values | {"completion": ["assistant", "4"]})]
    assert read(tmp_path, METRIC, kind="completions") == [([USER, ANSWER], [0, 1], values)]
    empty = refused(tmp_path, PROMPT | {"completion": ""}, kind="completions")
    assert empty.startswith("d:1: its 'completion' is empty")
    assert refused(tmp_path, PROMPT, kind="completions").startswith("d:1: has no 'completion' and its last message")
    assert "has no 'feedbacks' (or 'metrics')" in refused(tmp_path, COMPLETION, kind="feedbacks")
    assert "a pair needs 'chosen' and 'rejected'" in refused(tmp_path, COMPLETION, kind="preference")


def test_external_lines(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": ASK}) == [([USER], [0], {})]
    line = {"messages": ASK, "completion": "4", "metadata": {"topic": "math"}, "labels": {"a": "b"}}
    assert read(tmp_path, line) == [([USER, ANSWER], [0, 1], {"topic": "math", "labels": {"a": "b"}})]
    whole = {"messages": [*ASK, {"role": "assistant", "content": "4"}] * 2}
    assert read(tmp_path, whole) == [([USER, ANSWER, USER, ANSWER], [0, 0, 0, 1], {})]
    graded = {"messages": ASK, "completion": "4", "feedbacks": {"helpful": True, "quality": 0.8}}
    values = {"feedbacks": {"helpful": True, "quality": 0.8}}
    assert read(tmp_path, graded, feedback_key="helpful") == [([USER, ANSWER], [0, 1], {"res": True} | values)]
    pair = {"messages": ASK, "preferred_completion": "4", "other_completion": "5", "feedback_key": "quality"}
    texts = {"preferred_completion": "4", "other_completion": "5"}
    assert read(tmp_path, pair) == [([USER], [0], texts | {"feedback_key": "quality"})]
    assert read(tmp_path, {"input": ASK, "messages": []}) == [([USER], [0], {"messages": []})]
    assert read(tmp_path, {"messages": ASK, "completion": ""}) == [([USER], [0], {})]


def test_external_lines_of_a_kind(tmp_path: Path) -> None:
    whole = {"messages": [*ASK, *[{"role": "assistant", "content": "4"}] * 2], "completion": "5"}
    four = {"role": "assistant", "content": [{"type": "text", "text": "4"}]}
    kept = {"completion": "5", "completion_turns": [four, four]}
    assert read(tmp_path, whole, kind="prompts") == [([USER], [0], kept)]
    once = {"messages": whole["messages"][:-1]}
    assert read(tmp_path, once, kind="prompts") == [([USER], [0], {"completion": "4"})]
    assert "has no 'completion' and its last message" in refused(tmp_path, {"messages": ASK}, kind="completions")
    assert "('complettion': did you mean completion?)" in refused(
        tmp_path, {"messages": ASK, "complettion": "4"}, kind="completions"
    )
    assert "(or 'preferred_completion')" in refused(tmp_path, whole, kind="preference")
    only = {"messages": [{"role": "assistant", "content": "4"}]}
    assert "no prompt is left" in refused(tmp_path, only, kind="prompts")


def test_content_may_be_fragments(tmp_path: Path) -> None:
    image = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image", "url": image}]
    threads = load_threads(
        write(tmp_path, {"messages": [{"role": "user", "content": content}], "completion": "A cat."})
    )
    assert threads[0].get_fragments()[0] == ("user", content)
    internal = COMPLETION | {"prompt": [["user", content]]}
    assert load_threads(write(tmp_path, internal))[0].get_fragments()[0] == ("user", content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n  \r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path, end: str, mark: str) -> None:
    first = mark + json.dumps({"messages": ASK})
    threads = load_threads(write(tmp_path, first, {"messages": [{"role": "user", "content": "é\r\n\u2028"}]}, end=end))
    assert [thread.last_content() for thread in threads] == ["2+2?", "é\r\n\u2028"]


def test_a_last_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": ASK}))
    assert len(load_threads(path)) == 1


GOOD = {"messages": ASK, "completion": "4"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Input data was truncated"),
        ("[1]", "must be one JSON object, not an array"),
        ('"text"', "must be one JSON object, not text"),
        ("null", "must be one JSON object, not null"),
        ('{"metadata": {"a": NaN}}', "not JSON: invalid character"),
        ('{"metadata": {"a": -Infinity}}', "not JSON: invalid"),
        ('{"metadata": {"a": 1e999}}', "not JSON: Number out of range"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON: "),
        ('{"messages": [{"role": "user", "content": "a\x01b"}]}', "not JSON: invalid character"),
        ({}, "has no columns"),
        ({"mesages": ASK}, "('mesages': did you mean messages?)"),
        ({"messages": []}, "'messages' must be a list of messages that is not empty"),
        ({"messages": "hi"}, "'messages' must be a list of messages that is not empty"),
        ({"messages": ["hi", 3]}, "'messages[0]' must be an object with 'role' and 'content', not text"),
        ({"messages": [{"content": "a"}]}, "'messages[0].role' is missing"),
        ({"messages": [{"role": "user"}]}, "'messages[0].content' is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages[0].content' is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list of fragments, not a number"),
        ({"messages": [{"role": 3, "content": "a"}]}, "'messages[0]': a turn's role must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "invalid fragment type: 'smell'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "must be calls with a 'name'"),
        (GOOD | {"completion": 4}, "'completion' must be text or a list of messages, not a number"),
        (GOOD | {"completion": ["user", "4"]}, "'completion' must end with the assistant's turn"),
        (
            GOOD | {"topic": 1, "metadata": {"topic": 2}},
            "'topic' is a column and stands in 'metadata' with another value",
        ),
        ({"messages": ASK, "preferred_completion": "4"}, "has no 'rejected' (or 'other_completion')"),
        ({"messages": ASK, "preferred_completion": "4", "other_completion": 5}, "must be text or a list of messages"),
        ({"messages": ASK, "preferred_completion": "4", "other_completion": ""}, "text that is not empty"),
        (GOOD | {"feedbacks": [1]}, "'feedbacks' must be an object, not an array"),
        (COMPLETION | {"completion": [["user"]]}, "'completion' must be text or a list of messages, not an array"),
        (COMPLETION | {"metadata": META | {"external_data": 3}}, "'metadata.external_data' must be an object"),
        (METRIC | {"metrics": 3}, "'metrics' must be an object, not a number"),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, reason: str) -> None:
    message = refused(tmp_path, "", line)
    assert message.startswith("d:2: ") and reason in message and "\n" not in message


def test_bad_utf8(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:2: not UTF-8: byte 0xff at 15"):
        load_threads(path)
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match=r"d\.jsonl:1: not UTF-8: byte 0xff at 1"):
        load_threads(path)


def test_reasons_do_not_repeat_content(tmp_path: Path) -> None:
    secret = "hunter2"
    for line in (
        '{"messages": "hunter2"',
        {"messages": secret},
        {"messages": [{"role": "user", "content": {secret: 1}}]},
    ):
        assert secret not in refused(tmp_path, line)


def test_shapes_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    assert refused(tmp_path, "", GOOD, shared) == "d:3: has the shape ShareGPT, row 2 the shape messages"
    assert refused(tmp_path, {"messages": ASK}, GOOD) == "d:2: has the fields of completions, row 1 those of prompts"
    assert refused(tmp_path, METRIC, COMPLETION) == "d:2: has the fields of completions, row 1 those of feedbacks"
    assert "d:2: has the shape preference" in refused(tmp_path, PROMPT, PREFERENCE)
    assert len(read(tmp_path, COMPLETION, METRIC)) == 2
    assert len(read(tmp_path, {"messages": ASK}, GOOD, kind="prompts")) == 2


def test_the_first_usable_line_decides(tmp_path: Path) -> None:
    assert refused(tmp_path, "{", COMPLETION, {"messages": ASK}).splitlines()[1:] == [
        "d:3: has the fields of prompts, row 2 those of completions"
    ]


def test_bad_rows_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [GOOD, "{", *[GOOD] * 3, "[]"]
    assert len(read(tmp_path, *lines, max_refused=2)) == 4
    assert "2 rows are left out" in caplog.text and "d.jsonl:6: must be one JSON object" in caplog.text
    assert [line.split(":")[1] for line in refused(tmp_path, *lines, max_refused=1).splitlines()] == ["2", "6"]
    assert len(read(tmp_path, *["{"] * 30, GOOD, max_refused=30)) == 1


def test_columns_that_are_named_in_vain(tmp_path: Path) -> None:
    row = {"ask": "2+2?", "reply": "4"}
    assert "has no column 'asc' for 'user'; did you mean ask?" in refused(tmp_path, row, columns={"user": "asc"})
    with pytest.raises(UsageError, match="columns: there is no 'usr'"):
        load_threads(write(tmp_path, row), columns={"usr": "ask"})


@pytest.mark.parametrize("column", ["\n", 'a "b"', "back\\slash", "\x00", ""])
def test_a_column_of_any_name_goes_to_the_metadata(tmp_path: Path, column: str) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": messages, column: number} for number in range(3)]
    assert [thread.metadata[column] for thread in load_threads(write(tmp_path, *rows))] == [0, 1, 2]


def test_all_bad_lines_are_listed_up_to_twenty(tmp_path: Path) -> None:
    lines = [GOOD, "{", GOOD, "[]", GOOD]
    assert [line.split(":")[1] for line in refused(tmp_path, *lines).splitlines()] == ["2", "4"]
    many = refused(tmp_path, *["{"] * 50).splitlines()
    assert len(many) == 21 and many[-1] == "d: not read further"


def test_feedbacks_by_key(tmp_path: Path) -> None:
    line = GOOD | {"feedbacks": {"quality": 1, "note": "x"}}
    assert "has no feedback 'qualty': did you mean quality?" in refused(tmp_path, line, feedback_key="qualty")
    assert "must be a number or a boolean, not text" in refused(tmp_path, line, feedback_key="note")
    assert "has no feedback 'quality'" in refused(tmp_path, GOOD, feedback_key="quality")
    row = {"messages": ASK, "feedbacks": {"q": 1}}
    assert read(tmp_path, row, kind="prompts", feedback_key="q")[0][2] == {"feedbacks": {"q": 1}, "res": 1}


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "  \r\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl: has no line with a sample"):
        load_threads(path)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_LINE_BYTES", 200)
    long = {"messages": [{"role": "user", "content": "x" * 1000}]}
    message = refused(tmp_path, {"messages": ASK}, long, "{")
    assert message == "d:2: longer than 200 bytes; not read further"
    exact = json.dumps({"messages": [{"role": "user", "content": ""}]})
    fits = exact.replace('""', json.dumps("x" * (199 - len(exact))))
    assert len(fits) == 199 and len(read(tmp_path, fits)) == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(NotFoundError, match=r"no dataset file .*trian\.jsonl[\s\S]*did you mean train\.jsonl"):
        load_threads(tmp_path / "trian.jsonl")


def test_random_bytes_only_ever_give_data_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [json.dumps(line).encode() for line in (PROMPT, METRIC, PREFERENCE, GOOD)]
    path = tmp_path / "d.jsonl"
    for _ in range(300):
        data = bytearray(b"\n".join(lines[i] for i in rng.integers(0, 4, 3)))
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            load_threads(path)
        except DataError as error:
            assert error.message.startswith(f"{path}:")


def samples(count: int) -> list[StringThread]:
    return [StringThread([("user", str(i))], {"i": i}) for i in range(count)]


def test_dataset_is_numpys_permutation_from_the_first_pass_on() -> None:
    rng = np.random.default_rng(42)
    expected = [*rng.permutation(7), *rng.permutation(7), *rng.permutation(7)]
    data = DataSet(samples(7), allow_looping=True)
    assert [next(data).metadata["i"] for _ in range(21)] == expected
    assert data.access_indices == expected and data.idx == 21 and data.completion_percentage() == 3.0
    assert [thread.metadata["i"] for thread in DataSet(samples(7))] == expected[:7]
    assert [t.metadata["i"] for t in DataSet(samples(7), seed=1)] == [*np.random.default_rng(1).permutation(7)]


def test_dataset_counts_stamps_and_resets() -> None:
    data = DataSet(samples(3))
    assert [thread.metadata["sample_index"] for thread in data] == [0, 1, 2]
    assert data.completion_percentage() == 1.0 and next(data, None) is None
    data.reset()
    assert data.idx == 0 and len(list(data)) == 3
    assert len(data) == 3 and data[1].metadata["i"] == 1 and [t.metadata["i"] for t in data[1:]] == [1, 2]
    assert sorted(DataSet(["a", "b"])) == ["a", "b"]
    for looping in (False, True):
        assert list(DataSet([], allow_looping=looping)) == [] and DataSet([]).completion_percentage() == 1.0


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 12])
def test_dataset_state_continues_where_it_stood(taken: int) -> None:
    data = DataSet(samples(5), allow_looping=True, seed=3)
    for _ in range(taken):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    again = DataSet(samples(5), allow_looping=True, seed=9)
    again.set_state(state)
    assert again.completion_percentage() == data.completion_percentage()
    assert [next(again).metadata["i"] for _ in range(12)] == [next(data).metadata["i"] for _ in range(12)]
    with pytest.raises(DataError, match="is of 5 samples, the dataset has 4"):
        DataSet(samples(4)).set_state(state)


def test_convert_sample_dict() -> None:
    sample = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": 3}
    thread = convert_sample_dict()(sample)
    assert thread.get_turns() == [("user", "a"), ("assistant", "b")] and thread.get_turn_weights() == [0, 1]
    assert thread.metadata == {"label": 3}
    assert convert_sample_dict(trim_final_assistant_turns=True)(sample).get_turns() == [("user", "a")]
    turns = [{"from": "human", "value": "a"}]
    assert convert_sample_dict(None, "from", "value")(turns).get_turns() == [("user", "a")]
    assert convert_sample_dict("conv", "from", "value")({"conv": turns}).get_turns() == [("user", "a")]
    marked = {"messages": [*sample["messages"], {"role": "assistant", "content": "c", "weight": 0}]}
    assert convert_sample_dict()(marked).get_turn_weights() == [0, 1, 0]
    for bad in (
        {},
        {"messages": [{"role": "user"}]},
        {"messages": 3},
        {"messages": [{"role": "user", "content": None}]},
    ):
        with pytest.raises(DataError):
            convert_sample_dict()(bad)
