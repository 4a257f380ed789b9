"""What bad input gets: an exit code, every problem with its place, and no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BAD_YAML = [
    ("lrr: 1\nlora: {rr: 2}\nkind: nope\n", ["c.yaml:1:1: lrr: unknown key (did you mean lr", "c.yaml:2:8: lora.rr"]),
    ("lr: abc", ["c.yaml:1:5: lr: Input should be a valid number"]),
    ("lr: 1\nlr: 2", ["c.yaml:2:1: lr: duplicate key"]),
    ("lr: [1", ["not valid YAML"]),
    ("note: !!python/object/apply:os.system ['touch canary']", ["c.yaml:1:7: note: the tag"]),
    ("note: " + "[" * 200, ["c.yaml:1:70: nested deeper than 64 levels"]),
    ("note: " + "[" * 100_000, ["c.yaml:1:", " nest"]),  # our limit or the parser's, whichever is met first
    ("- 1", ["c.yaml:1:1: the top level must be a map"]),
    ("lora: {r: 0}", ["c.yaml:1:11: lora.r: Input should be greater than or equal to 1"]),
]


@pytest.mark.parametrize(("text", "expected"), BAD_YAML, ids=lambda v: v[:20] if isinstance(v, str) else "")
def test_yaml(adaptive: Any, text: str, expected: list[str]) -> None:
    Path("c.yaml").write_text(text)
    done = adaptive("run", "hello.py", "-c", "c.yaml")
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    for words in expected:
        assert any(words in error for error in done.errors)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["run", "hello.py", "--confg", "x"], 2, ["unknown flag --confg (did you mean --config?)"]),
        (["run", "hello.py", "--lora.rr", "4"], 2, ["unknown flag --lora.rr (did you mean --lora.r?)"]),
        (["run", "hello.py", "--lrr=1", "--notee=2"], 2, ["unknown flag --lrr", "unknown flag --notee"]),
        (["run", "hello.py", "--lr", "abc"], 2, ["--lr: Input should be a valid number"]),
        (["run", "hello.py", "--lr", "-1", "--lora.r", "x"], 2, ["--lr: Input", "--lora.r: Input"]),
        (["run", "hello.py", "--set", "lorra.r=1"], 2, ["--set lorra.r: lorra: unknown key (did you mean lora"]),
        (["run", "hello.py", "--set", "lr"], 2, ["--set lr: write it as KEY=VALUE"]),
        (["run", "hello.py", "--num-processes", "x"], 2, ["'--num-processes'"]),
        (["run", "hello.py", "--num-processes", "0"], 2, ["--num-processes: 0 (allowed: 1 to 1024)"]),
        (["run", "hello.py", "--device", "tpu"], 2, ["'--device'"]),
        (["run", "hello.py", "--memory", "lots"], 2, ["lots"]),
        (["run", "hello.py", "--timeout", "soon"], 2, ["soon"]),
        (["run", "hello.py", "--timeout", "0"], 2, ["--timeout: not a time: '0' (allowed: 0.001 s to 3650d)"]),
        (["run", "hello.py", "--timeout", "9" * 20], 2, ["(allowed: 0.001 s to 3650d)"]),
        (["run", "hello.py", "--hang-timeout", "never"], 2, ["--hang-timeout: not a time: 'never'"]),
        (["run", "hello.py", "--silence-timeout", "1"], 2, ["--silence-timeout: not a time: '1' (allowed: 2 s"]),
        (["run", "hello.py", "--fault-grace", "-1"], 2, ["--fault-grace: not a time: '-1'"]),
        (["run", "hello.py", "--assume", "8x80GiB"], 2, ["--assume"]),
        (["run", "hello.py", "--dry-run", "--assume", "1x80GiB", "--deterministic"], 4, ["for ranks on CPU"]),
        (["run", "hello.py", "extra"], 2, ["extra"]),
        (["run"], 2, ["RECIPE"]),
        (["rnu", "hello.py"], 2, ["there is no command 'rnu'"]),
        (["run", "helo.py"], 3, ["there is no recipe 'helo.py'"]),
        (["run", "sfft"], 3, ["there is no recipe 'sfft'"]),
        (["run", "hello.py:man"], 3, ["has no function 'man'"]),
        (["run", "hello.py", "-c", "nope.yaml"], 3, ["there is no configuration file nope.yaml"]),
        (["run", "hello.py", "--model", "builtin:tiny-ml"], 3, ["--model: ", "builtin:tiny-lm"]),
        (["run", "hello.py", "--model", "org/name"], 3, ["adaptive models add"]),
        (["run", "hello.py", "--data", "nope.jsonl"], 3, ["--data: there is no dataset file"]),
        (["recipes", "show", "sfft"], 3, ["did you mean sft?"]),
        (["runs", "show", "nothing"], 3, ["there is no run 'nothing'"]),
        (["run", "hello.py", "--accelerate-config", "nope.yaml", "--dry-run"], 3, ["nope.yaml"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else str(v),
)
def test_words(adaptive: Any, words: list[str], code: int, expected: list[str]) -> None:
    done = adaptive(*words)
    assert done.code == code
    assert "Traceback" not in done.err
    for part in expected:
        assert part in done.err


def test_files_and_flags_together_in_one_go(adaptive: Any) -> None:
    Path("c.yaml").write_text("lrr: 1\n")
    done = adaptive("run", "hello.py", "-c", "c.yaml", "--lora.r", "x", "--set", "nott=1", "--json")
    assert done.code == done.json["exit"] == 2
    assert len(done.json["errors"][0]["details"]["errors"]) == 3
    assert [error.partition(":")[0] for error in done.errors] == ["c.yaml", "--set nott", "--lora.r"]
    source = done.json["errors"][0]["details"]["errors"][0]["source"]
    assert source == {"kind": "file", "name": "c.yaml", "line": 1, "column": 1}


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("x = 1", 2, "no function is marked"),
        ("import nowhere_to_be_found", 2, "bad.py:1"),
        ("def f(:", 2, "bad.py:1"),
        ("# /// adaptive\n# dependencies = ['not-installed-here']\n# ///", 4, "pip install 'not-installed-here'"),
        ("1 / 0", 2, "bad.py:1: ZeroDivisionError"),
    ],
)
def test_recipes_that_are_none(adaptive: Any, text: str, code: int, expected: str) -> None:
    Path("bad.py").write_text(text)
    for extra in ((), ("--help",)):
        done = adaptive("run", "bad.py", *extra)
        assert done.code == code
        assert expected in done.err
        assert "Traceback" not in done.err


def test_a_bug_of_ours_is_70_with_a_log(adaptive: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("harmony_core.cli.runs.list_runs", lambda home: 1 / 0)
    done = adaptive("runs", "list")
    assert done.code == 70
    assert "Traceback" not in done.err
    (log,) = tmp_path.glob("adaptive-bug-*.log")
    assert str(log) in done.err
    assert "ZeroDivisionError" in log.read_text()


@pytest.mark.parametrize(
    "words", [["run"], ["datasets", "inspect", "--model", "builtin:tiny-lm"], ["models", "add", "m"]]
)
@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "~80GiB"])
def test_a_name_that_can_be_no_file_is_not_there(adaptive: Any, words: list[str], name: str) -> None:
    done = adaptive(*words, name)
    assert done.code == 3
    assert name[:20] in done.errors[0]
