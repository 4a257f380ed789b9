"""The recipes that come with the package, through the command line."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harmony_core.recipe import built_in_recipes, load_recipe

NAMES = sorted(built_in_recipes())
LAST_LINE = re.compile(r"held-out accuracy: (\d\.\d\d)")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def adaptive(home: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ADAPTIVE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "harmony_core.cli", "run", *words, "--device", "cpu"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=840)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# --- as programs ------------------------------------------------------------------------------------------------


def test_these_recipes_ship() -> None:
    trained = {"sft", "dpo", "reward_model", "grpo", "gspo", "ppo", "sft_then_grpo", "env_grpo"}
    assert trained | {"generate", "quickstart", "evaluate"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_uses_the_documented_api_only(name: str) -> None:
    source = built_in_recipes()[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    imported = [
        alias
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    ]
    assert not [module for module in imported if module.startswith(("harmony_core", "torch", "transformers"))]


@pytest.mark.parametrize("name", NAMES)
def test_help_has_something_to_say_about_every_field(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.doc
    fields = {k: v for k, v in recipe.json_schema["properties"].items() if k != "union_variant"}
    assert [field for field, schema in fields.items() if not schema.get("description")] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_beside_it_is_valid_commented_and_holds_the_defaults(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.config_type is not None
    text = recipe.path.with_suffix(".yaml").read_text(encoding="utf-8")
    assert text.count("#") >= 3
    written = yaml.safe_load(text)
    # YAML 1.1 reads 3e-3 as text; the engine's own loader reads it as the number that it is.
    written = {key: float(value) if re.fullmatch(r"\de-\d", str(value)) else value for key, value in written.items()}
    config = recipe.config_type.model_validate(written)
    for key, info in recipe.config_type.model_fields.items():
        if key in written and not info.is_required():
            assert getattr(config, key) == info.default, key


# --- running ----------------------------------------------------------------------------------------------------


def test_training_saving_and_asking(home: Path, tmp_path: Path) -> None:
    """`sft` in an empty home and an empty folder, as short as two ranks need to share the work; then `generate`."""
    done = result(adaptive(home, tmp_path, "sft", "--epochs", "0.1", "--num-processes", "2", "--json"))
    assert done["result"]["model"] == "sft@1"
    assert done["result"]["completion_percentage"] == 1.0
    assert done["result"]["loss"] > 0
    tokens = [0, 0]
    for event in map(json.loads, (home / "runs" / done["run"] / "events.jsonl").read_text("utf-8").splitlines()):
        if event["type"] == "micro_batch":
            tokens[event["rank"]] += event["data"]["tokens"]
    assert min(tokens) >= 0.4 * sum(tokens)
    asked = adaptive(home, tmp_path, "generate", "--model", "sft", "--prompt", "zebra", "--max-tokens", "4")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert list(tmp_path.iterdir()) == [], "nothing is left in the caller's folder"


@pytest.mark.slow
def test_the_quickstart_learns_to_sort(home: Path, tmp_path: Path) -> None:
    done = adaptive(home, tmp_path, "quickstart")
    assert done.returncode == 0, done.stderr
    found = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert found is not None
    assert float(found[1]) >= 0.9
    assert "before training:" in done.stdout
    assert "after training:" in done.stdout
    again = result(adaptive(home, tmp_path, "quickstart", "--evaluate", "quickstart", "--json"))
    assert again["gates"][0]["value"] == pytest.approx(float(found[1]), abs=0.006)


@pytest.mark.slow
def test_the_untrained_model_cannot_sort(home: Path, tmp_path: Path) -> None:
    done = adaptive(home, tmp_path, "quickstart", "--evaluate", "builtin:tiny-lm", "--json")
    assert done.returncode == 8
    assert json.loads(done.stdout)["gates"][0]["value"] < 0.1


@pytest.mark.slow
def test_from_shuffled_answers_nothing_is_learnt(home: Path, tmp_path: Path) -> None:
    done = result(adaptive(home, tmp_path, "quickstart", "--shuffle-answers", "--save-as", "shuffled", "--json"))
    assert done["gates"][0]["value"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("reward_model", "0.95"), ("dpo", "0.95"), ("grpo", "0.9"), ("sft_then_grpo", "0.9"), ("env_grpo", "0.8")],
)
def test_a_recipe_learns_what_it_says(home: Path, tmp_path: Path, name: str, least: str) -> None:
    """On rows that were not trained; below `least` the exit code would be 8."""
    done = result(adaptive(home, tmp_path, name, "--at-least", least, "--save-as", "null", "--json"))
    assert done["gates"][0]["value"] >= float(least)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo", "ppo"])
def test_what_a_recipe_saves_can_be_evaluated(home: Path, tmp_path: Path, name: str) -> None:
    words = ("--warm-up-epochs", "2.2", "--steps", "8", "--json")
    trained = result(adaptive(home, tmp_path, name, *words))["gates"][0]["value"]
    assert trained > 0.2
    evaluated = result(adaptive(home, tmp_path, "evaluate", "--model", name, "--json"))
    assert evaluated["gates"][0]["value"] == pytest.approx(trained, abs=0.02)
