"""`adaptive models`, through the command line's own entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import small_models

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of `adaptive models ...` in an empty home."""
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    main = entry_points(group="console_scripts")["adaptive"].load()

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["models", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_models.write_model(tmp_path / "source")


def data(run: Run, *words: str) -> dict[str, Any]:
    """The one JSON object on stdout, whose exit code is the command's."""
    code, out, _ = run(*words, "--json")
    found: dict[str, Any] = json.loads(out)
    assert found["exit"] == code
    assert found["ok"] == (code == 0)
    return found


def test_a_model_from_add_to_rm(run: Run, source: Path) -> None:
    assert run("list") == (0, "", "no models yet; builtin:tiny-lm is always there (adaptive models add KEY SOURCE)\n")
    assert run("add", "small", str(source), "--set", "tokens_to_generate=64") == (0, "small@1\n", "")
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["KEY", "small"]
    path = run("path", "small")[1].strip()
    assert (Path(path) / "config.json").is_file()
    assert run("verify") == (0, "ok small@1\n", "")
    assert run("verify", "small", "builtin:tiny-lm", "--quick") == (0, "ok small@1\nok builtin:tiny-lm\n", "")
    assert run("rm", "small") == (0, "removed small@1\n", "")
    assert not Path(path).exists()


def test_json_says_the_same(run: Run, source: Path) -> None:
    assert data(run, "add", "small", str(source))["model"]["ref"] == "small@1"
    assert data(run, "list")["models"][0]["newest"]["parameters"] > 0
    shown = data(run, "show", "small")["model"]
    assert (shown["format"], shown["architecture"], shown["heads"]) == ("hf", "LlamaForCausalLM", 4)
    assert data(run, "path", "small") == {"ok": True, "exit": 0, "ref": "small@1", "path": shown["path"]}
    assert data(run, "verify")["verified"] == ["small@1"]
    assert data(run, "alias", "small", "best")["ref"] == "small@1"
    assert data(run, "set", "small", "tp=2")["model"]["defaults"]["tp"] == {"value": 2, "source": "stored with small"}
    assert data(run, "rm", "small", "--all")["removed"] == ["small@1"]


def test_show_names_every_default_and_its_source(run: Run, source: Path) -> None:
    run("add", "small", str(source))
    assert run("set", "small", "kv_cache_len=8_192", "description=for tests") == (
        0,
        "kv_cache_len=8192\ndescription=for tests\n",
        "",
    )
    _, out, _ = run("show", "small")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "tp 1 (library default)" in lines
    assert "kv_cache_len 8,192 (stored with small)" in lines
    assert "tokens_to_generate 2,048 (library default)" in lines
    assert "tokens_to_generate 64 (builtin:tiny-lm)" in [
        " ".join(line.split()) for line in run("show", "builtin:tiny-lm")[1].splitlines()
    ]
    run("set", "small", "kv_cache_len=null")
    run("set", "small", "tp=2")
    run("set", "small", "--unset", "tp")
    defaults = data(run, "show", "small")["model"]["defaults"]
    assert {entry["source"] for entry in defaults.values()} == {"library default"}


def test_template_variables_are_set_as_json(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ enable_thinking }}{{ messages[0].content }}")
    assert run("add", "small", str(source), "--chat-template", str(tmp_path / "t.jinja"))[0] == 0
    assert run("set", "small", 'chat_template_kwargs={"enable_thinking": false}')[0] == 0
    shown = " ".join(run("show", "small")[1].split())
    assert 'chat_template_kwargs {"enable_thinking": false} (stored with small)' in shown
    code, _, err = run("set", "small", 'chat_template_kwargs={"enable_thinkin": false}')
    assert code == 2 and "did you mean enable_thinking?" in err
    run("set", "small", "--unset", "chat_template_kwargs")
    assert "chat_template_kwargs" not in run("show", "small")[1]


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (("show", "smal"), 3, "did you mean small?"),
        (("show", "Org/Model"), 3, "adaptive models add model hf:Org/Model"),
        (("path", "small@9"), 3, "versions: 1"),
        (("set", "small", "tpp=2"), 2, "did you mean tp?"),
        (("set", "small", "tp=two"), 2, "whole number"),
        (("set", "small", "tp=3"), 2, "tp may be 1, 2, 4"),
        (("set", "small", "tp"), 2, "NAME=VALUE"),
        (("set", "small"), 2, "nothing to set"),
        (("set", "small", "--unset", "tpp"), 2, "did you mean tp?"),
        (("set", "small", "chat_template_kwargs=false"), 2, "must be a JSON object"),
        (("set", "small", "chat_template_kwargs={'a': 1}"), 2, "must be a JSON object"),
        (("add", "Bad Key", "builtin:tiny-lm"), 2, "for example 'bad-key'"),
        (("add", "x", "/nowhere"), 3, "does not exist"),
        (("add", "x", "builtin:tiny-lm", "--set", "tpp=1"), 2, "did you mean tp?"),
        (("rm", "builtin:tiny-lm"), 2, "nothing to remove"),
        (("rm", "other"), 3, "small"),
        (("alias", "small", "1"), 2, "cannot be an alias"),
        (("alias", "small", "best=x"), 2, "not a version number"),
        (("alias", "small", "best", "--rm"), 3, "no alias"),
        (("verify", "other"), 3, "small"),
        (("lst",), 2, "lst"),
        (("show", "small", "--jsn"), 2, "--json"),
    ],
)
def test_mistakes(run: Run, source: Path, words: tuple[str, ...], code: int, hint: str) -> None:
    run("add", "small", str(source))
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert hint in err
    assert data(run, "list")["models"][0]["versions"] == [1]
    assert data(run, "show", "small")["model"]["defaults"]["tp"]["value"] == 1


def test_a_mistake_as_json(run: Run) -> None:
    assert data(run, "show", "nothing")["exit"] == 3


def test_damage_is_exit_7_and_listed(run: Run, source: Path) -> None:
    run("add", "good", str(source))
    run("add", "bad", str(source))
    path = Path(run("path", "bad")[1].strip())
    (path / "config.json").write_text("{}")
    code, out, err = run("verify")
    assert (code, out) == (7, "")
    assert "bad@1" in err
    assert "config.json" in err
    assert data(run, "verify", "bad")["exit"] == 7
    code, out, _ = run("list")
    assert code == 0
    assert "damaged" in next(line for line in out.splitlines() if line.startswith("bad"))


def test_what_is_needed_is_exit_6(run: Run, source: Path, tmp_path: Path) -> None:
    run("add", "small", str(source))
    adapter = small_models.write_adapter(tmp_path / "adapter")
    assert run("add", "lora", str(adapter), "--base", "small")[:2] == (0, "lora@1\n")
    code, _, err = run("rm", "small")
    assert code == 6
    assert "lora@1" in err
    assert run("add", "small", str(source))[1] == "small@2\n"
    assert run("rm", "small")[0] == 6
    assert data(run, "show", "lora")["model"]["base"] == "small@1"


def test_remarks_go_to_stderr(run: Run, tmp_path: Path) -> None:
    bare = small_models.write_model(tmp_path / "bare", with_tokenizer=False)
    assert run("add", "bare", str(bare), "--reference") == (
        0,
        "bare@1\n",
        "note: bare@1: no tokenizer: it serves calls with raw tokens only\n",
    )


def test_a_pattern_narrows_the_list(run: Run, source: Path) -> None:
    for key in ("team/a", "team/b", "other"):
        run("add", key, str(source))
    assert [model["key"] for model in data(run, "list", "team/*")["models"]] == ["team/a", "team/b"]
