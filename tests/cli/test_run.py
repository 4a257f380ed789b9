"""`adaptive run`: values from everywhere, what goes to which stream, and what is left in the run's directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from harmony_core.home import Home
from harmony_core.options import RUNNER_FLAGS
from harmony_core.runs.records import find_run, list_runs


def test_help_of_the_runner_and_of_a_recipe(adaptive: Any) -> None:
    done = adaptive("run", "--help")
    assert done.code == 0
    flags = {word.strip("-,`").replace("-", "_") for word in done.out.split() if word.startswith("--")}
    assert flags == RUNNER_FLAGS
    done = adaptive("run", "hello.py", "--help")
    assert done.code == 0
    assert "Says hello." in done.out
    text = " ".join(done.out.split())
    assert "The model, with [/brackets] and {braces} and %s." in text
    assert "--lora.r INT [>= 1; default: 16]" in text
    assert "--shuffle / --no-shuffle" in text
    assert "one of cosine, linear" in text
    assert "union-variant" not in text


@pytest.mark.parametrize("width", ["40", "200"])
def test_help_in_any_terminal(adaptive: Any, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = adaptive("run", "hello.py", "--help")
    assert done.code == 0
    assert "\x1b" not in done.out


@pytest.mark.parametrize("words", [[], ["--help"], ["config"], ["recipes", "--help"], ["models", "--help"]])
def test_help_everywhere(adaptive: Any, words: list[str]) -> None:
    done = adaptive(*words)
    assert "Usage: adaptive" in done.out + done.err
    assert done.code == (0 if "--help" in words else 2)


def test_version(adaptive: Any) -> None:
    import harmony_core

    assert adaptive("--version").out == f"harmony-core {harmony_core.__version__}\n"


def test_config_show_gives_the_same_configuration_again(adaptive: Any) -> None:
    first = adaptive("config", "show", "hello.py", "--lr", "1e-4", "--note", "1e-5", "--lora", "null", "--no-shuffle")
    Path("c.yaml").write_text(first.out)
    assert adaptive("config", "show", "hello.py", "-c", "c.yaml").out == first.out
    sources = adaptive("config", "show", "hello.py", "-c", "c.yaml", "--sources").out
    assert 'note           "1e-5"  # c.yaml:9:7' in sources


def test_config_schema(adaptive: Any) -> None:
    assert json.loads(adaptive("config", "schema", "hello.py").out)["properties"]["lr"]["exclusiveMinimum"] == 0


def test_a_run_and_what_it_leaves(adaptive: Any) -> None:
    Path("c.yaml").write_text("lr: 0.25\n")
    done = adaptive("run", "hello.py", "-c", "c.yaml", "--seed", "7", "--no-shuffle", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out == 'a print of the recipe\n{"lr": 0.25, "seed": 7, "shuffle": false}\n'
    (record,) = list_runs(Home.open())
    assert record.status == "succeeded"
    directory = record.directory
    assert json.loads((directory / "sources.json").read_text())["seed"] == "--seed"
    assert json.loads((directory / "models.json").read_text())["model"]["ref"] == "builtin:tiny-lm"
    assert {path.name for path in (directory / "inputs").iterdir()} == {"0-hello.py", "1-c.yaml"}
    assert json.loads((directory / "result.json").read_text())["result"]["lr"] == 0.25
    types = [json.loads(line)["type"] for line in (directory / "events.jsonl").read_text().splitlines()]
    assert types[:2] == ["run.start", "config.resolved"]
    assert types[-1] == "run.end"
    again = adaptive("config", "show", "hello.py", "-c", str(directory / "config.yaml"))
    assert again.out == (directory / "config.yaml").read_text()
    assert record.id in adaptive("runs", "list").out
    assert json.loads(adaptive("runs", "show", record.id, "--json").out)["outcome"]["ok"] is True


def test_json_is_one_object_and_prints_go_to_stderr(adaptive: Any) -> None:
    Path("loud.py").write_text(
        "import os, subprocess\nfrom harmony_core.recipe.context import RecipeContext\n"
        "from harmony_core.recipe import recipe_main\nprint('at import')\n"
        "@recipe_main\nasync def main(ctx: RecipeContext):\n"
        "    os.write(1, b'raw\\n')\n    subprocess.run(['echo', 'from a child'])\n    return float('inf')\n"
    )
    done = adaptive("run", "loud.py", "--json", "--dry-run")
    assert done.code == 0
    assert done.json["result"] == "inf"
    assert {"ok", "exit", "code", "run", "result", "gates", "models", "errors"} <= set(done.json)
    for words in ("at import", "raw", "from a child"):
        assert words in done.err
    assert "at import\n" in adaptive("run", "loud.py", "--dry-run").out


def test_failures_in_json(adaptive: Any) -> None:
    done = adaptive("run", "hello.py", "--note", "raise", "--json", "--dry-run")
    assert done.code == done.json["exit"] == 1
    assert done.json["ok"] is False
    assert done.json["errors"][0]["where"].endswith("hello.py:33")
    assert done.errors[0] == "ValueError: as asked"
    done = adaptive("run", "hello.py", "--note", "much too long", "--json", "--dry-run")
    assert (done.json["exit"], done.json["code"]) == (8, "gate_failed")
    assert done.json["gates"][0]["name"] == "note"
    assert adaptive("run", "nope.py", "--json").json["code"] == "not_found_error"
    assert adaptive("run", "hello.py", "--nope", "--json").json["errors"][0]["code"] == "usage_error"


def test_a_dry_run_plans_and_leaves_no_run(adaptive: Any) -> None:
    done = adaptive("run", "sft", "--dry-run", "--quiet")
    assert done.code == 0, done.err
    assert "spawn" in done.out
    assert "nothing was started" in done.out
    assert done.err == ""
    assert list_runs(Home.open()) == []
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "hello.py"]
    done = adaptive("run", "sft", "--dry-run", "--assume", "8x80GiB", "--json")
    assert done.json["plan"][0]["replicas"] == 8


def test_quiet_says_only_what_is_wrong(adaptive: Any) -> None:
    done = adaptive("run", "hello.py", "--quiet", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    done = adaptive("run", "hello.py", "--quiet", "--note", "much too long", "--device", "cpu")
    assert (done.code, done.err) == (8, "gate note: 13.0 < 5.0 does not hold\n")


def test_secrets_given_as_flags_are_not_kept(adaptive: Any) -> None:
    Path("secret.py").write_text(
        "from harmony_core.recipe.context import RecipeContext\n"
        "from harmony_core.recipe import InputConfig, recipe_main\n"
        "class Config(InputConfig):\n    api_key: str = ''\n"
        "@recipe_main\nasync def main(config: Config, ctx: RecipeContext):\n    raise ValueError(config.api_key)\n"
    )
    assert adaptive("run", "secret.py", "--api-key", "canary-in-flag", "--device", "cpu").code == 1
    directory = find_run(Home.open(), "last").directory
    for path in directory.rglob("*"):
        if path.is_file():
            assert "canary-in-flag" not in path.read_text(), path


def test_yaml_from_stdin(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import types

    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"lr: 0.125\nnope: 1\n")))
    done = adaptive("config", "show", "hello.py", "-c", "-")
    assert done.errors == ["<stdin>:2:1: nope: unknown key (did you mean note?)"]


def test_recipes_list_show_copy(adaptive: Any) -> None:
    assert "sft" in adaptive("recipes", "list").out
    names = {row["name"] for row in json.loads(adaptive("recipes", "list", "--json").out)["recipes"]}
    assert {"sft", "generate", "quickstart"} <= names
    source = adaptive("recipes", "show", "sft").out
    assert adaptive("recipes", "copy", "sft", "mine.py").out.splitlines() == ["mine.py", "mine.yaml"]
    assert Path("mine.py").read_text() == source
    assert adaptive("recipes", "copy", "sft", "mine.py").code == 6
    assert adaptive("run", "mine.py", "-c", "mine.yaml", "--dry-run").code == 0


def test_doctor(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Asking torch itself takes seconds in a process of its own.
    monkeypatch.setattr("harmony_core.cli.doctor._torch", list)
    done = adaptive("doctor", "--json")
    checks = {check["name"]: check["status"] for check in done.json["checks"]}
    assert {"python", "packages", "adaptive_harmony", "home", "locks", "/dev/shm", "compiler", "headers"} <= set(checks)
    assert done.code == (4 if "fail" in checks.values() else 0)
    monkeypatch.setenv("ADAPTIVE_HOME", os.devnull)
    done = adaptive("doctor")
    assert done.code == 4
    assert "fail  home" in done.out


def test_doctor_says_where_a_run_listens(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmony_core.cli.doctor._torch", list)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for interface, status, words in (("", "ok", "the loopback interface"), ("eth7", "warn", "NCCL_SOCKET_IFNAME=eth7")):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", interface)
        [check] = [check for check in adaptive("doctor", "--json").json["checks"] if check["name"] == "network"]
        assert (check["status"], f"a run listens on {words}:" in check["detail"]) == (status, True)
