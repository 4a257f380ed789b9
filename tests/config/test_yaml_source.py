"""YAML as configuration: 1.2 scalars, positions, and text that means harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony_core.config.yaml_source import MAX_BYTES, load_yaml, load_yaml_file, parse_value
from harmony_core.errors import NotFoundError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.5", 1.5),
        ("-.inf", float("-inf")),
        ("5", 5),
        ("-3", -3),
        ("100_000", 100_000),
        ("007", "007"),
        ("0x1f", "0x1f"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"null"', "null"),
        ("!!str 5", "5"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: .5}}", {"a": {"b": 0.5}}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    document = load_yaml(f"key: {text}", "f.yaml")
    assert document.issues == []
    assert document.data == {"key": value}
    assert type(document.data["key"]) is type(value)


def test_positions_of_keys_and_values() -> None:
    document = load_yaml(b"\xef\xbb\xbfa: 1\r\nblock:\r\n  list:\r\n    - x\r\n    - {deep: 2}\r\n", "f.yaml")
    at = {path: str(source) for path, source in document.sources.items()}
    assert document.data == {"a": 1, "block": {"list": ["x", {"deep": 2}]}}
    assert at[("a",)] == "f.yaml:1:4"
    assert at[("block", "list", 1, "deep")] == "f.yaml:5:14"
    assert str(document.sources[("block", "list", 1, "deep")].at_key()) == "f.yaml:5:8"


def test_aliases_and_merge_keys() -> None:
    text = "base: &b {r: 8, alpha: 1}\nlora:\n  <<: *b\n  r: 9\nagain: *b\n"
    document = load_yaml(text, "f.yaml")
    assert document.issues == []
    assert document.data["lora"] == {"r": 9, "alpha": 1}
    assert document.data["again"] is not document.data["base"]
    assert str(document.sources[("lora", "r")]) == "f.yaml:4:6"
    assert str(document.sources[("lora", "alpha")]) == "f.yaml:1:24"
    assert str(document.sources[("again",)]) == "f.yaml:1:7"
    assert str(document.sources[("again",)].at_key()) == "f.yaml:5:1"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (b"a: 1\nb: 2\na: 3\n", "f.yaml:3:1", "duplicate key (first at line 1)"),
        (b"a: {b: 1, b: 2}", "f.yaml:1:11", "duplicate key"),
        (b"a: !!python/object/apply:os.system ['touch x']", "f.yaml:1:4", "!!python/object/apply:os.system"),
        (b"a: !!int 5", "f.yaml:1:4", "not allowed"),
        (b"!!set {a}", "f.yaml:1:1", "not allowed"),
        (b"a: [1,\n", "f.yaml:2:1", "not valid YAML"),
        (b"a: b: c", "f.yaml:1:5", "not valid YAML"),
        (b"ok: 1\na: \xff", "f.yaml:2:4", "not UTF-8"),
        (b"ok: 1\na: \x01", "f.yaml:2:4", "control character"),
        (b"a: *b", "f.yaml:1:4", "undefined alias"),
        (b"a: &a [*a]", "f.yaml:1:4", "contains itself"),
        (b"a: 1\n---\nb: 2", "f.yaml:2:1", "another document"),
        (b"- 1", "f.yaml:1:1", "must be a map"),
        (b"? [a]\n: b", "f.yaml:1:3", "key must be plain text"),
        (b"a:\n  <<: 5", "f.yaml:2:7", "takes a map"),
        (b"#" * (MAX_BYTES + 1), "f.yaml:1:1", "larger than"),
    ],
)
def test_what_is_wrong_and_where(text: bytes, place: str, words: str) -> None:
    (issue,) = load_yaml(text, "f.yaml").issues
    assert str(issue.source) == place
    assert words in issue.message


def test_several_problems_are_reported_together() -> None:
    issues = load_yaml("a: 1\na: 2\nb: !x 1\n", "f.yaml").issues
    assert [str(issue.source) for issue in issues] == ["f.yaml:2:1", "f.yaml:3:4"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: " + "[" * 100_000 + "]" * 100_000,
        "a: " + "{a: " * 100_000,
        "- " * 100_000,
        "[\n" * 100_000,
        "? " * 100_000,
        "&a " * 100_000,
        "!" * 100_000,
        "a: [" + ",".join(f"&a{i} x" for i in range(50_000)) + "]",
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "a: &a x\nb: [" + ",".join(["*a"] * 200) + "]",
    ],
    ids=["brackets", "closed", "maps", "dashes", "lines", "questions", "anchors", "tags", "named", "bomb", "aliases"],
)
@pytest.mark.timeout(60, method="signal")  # quadratic work would take minutes
def test_hostile_text_is_refused_quickly(text: str) -> None:
    document = load_yaml(text, "f.yaml")
    if "&a0 x" not in text:
        assert len(document.issues) >= 1
    assert all(len(str(issue)) < 400 for issue in document.issues)


def test_empty_is_an_empty_map() -> None:
    assert load_yaml("", "f.yaml").data == {}
    assert load_yaml("# nothing\n", "f.yaml").issues == []


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(NotFoundError, match=r"config\.yaml"):
        load_yaml_file(tmp_path / "confg.yaml")


def test_one_value() -> None:
    assert parse_value("{a: 1}") == {"a": 1}
    assert parse_value("[1,\n 2]") == [1, 2]
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_value("[1")
    with pytest.raises(ValueError, match="not"):
        parse_value("1\nother: 2")
