"""A recipe with an external model, through the real command: its record, its dry run, and no secret anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from provider_server import Answer, provider_server

RECIPE = """
import asyncio
from harmony_core.errors import HarmonyError
from adaptive_harmony import StringThread
from adaptive_harmony.parameters import Model
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main

class Config(InputConfig):
    judge_model: Model = Model(model_key="builtin:tiny-lm")

@recipe_main
async def main(config: Config, ctx: RecipeContext) -> int:
    judge = await config.judge_model.extra_params(max_retries=0).spawn_inference("judge", ctx, kv_cache_len=1000)
    asked = [StringThread([("user", f"very private question {i}")]) for i in range(5)]
    async def answered(thread: StringThread) -> bool:
        try:
            return bool((await judge.generate(thread)).completion())
        except HarmonyError as error:
            print(error)
            return False

    return sum(await asyncio.gather(*map(answered, asked)))
"""
KEY = "planted-key-1234567890"


def run(tmp_path: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    without = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))}
    done = subprocess.run(
        [sys.executable, "-m", "harmony_core.cli", "run", str(recipe), "--device", "cpu", "--json", *words],
        env=without | {"ADAPTIVE_HOME": str(tmp_path / "home")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_run_counts_its_requests_and_keeps_no_secret(tmp_path: Path) -> None:
    with provider_server() as server:
        server.key = None
        server.script.append(Answer(400, body=json.dumps({"error": {"message": f"bad key {KEY}"}})))
        url = server.host + "/v1"
        code, result, said = run(tmp_path, "--judge-model", "openai://GPT-4o", OPENAI_API_KEY=KEY, OPENAI_BASE_URL=url)
        assert (code, result["result"]) == (0, 4), said
        totals = {"requests": 5, "failed": 1, "cut": 0, "prompt_tokens": 44, "completion_tokens": 12}
        assert result["external"] == {"openai://GPT-4o": totals}
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
        code, planned, _ = run(tmp_path, "--judge-model", f"openai://m?base_url={url}", "--dry-run")
        assert code == 0 and planned["planned_until"].startswith("recipe.py:") and len(server.requests) == 5
    files = {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}
    (record,) = (path for path in files if path.name == "result.json")
    assert json.loads(files[record])["external"] == result["external"]
    assert b"openai://GPT-4o" in files[record.parent / "report.html"]
    assert b"external.request" in files[record.parent / "events.jsonl"]
    for path, text in files.items():
        assert KEY.encode() not in text, path
        assert b"private question" not in text or path.suffix == ".py", path


@pytest.mark.parametrize(
    ("key", "code", "told"),
    [
        ("openai://gpt-4o", 4, "OPENAI_API_KEY is not set"),
        ("openai://gpt-4o?api_key=planted-key-1234567890", 2, "OPENAI_API_KEY"),
        ("gemini://flash", 2, "not a provider of models"),
    ],
)
def test_a_key_that_cannot_be_used_starts_nothing(tmp_path: Path, key: str, code: int, told: str) -> None:
    found, result, said = run(tmp_path, "--judge-model", key)
    assert found == code and told in result["errors"][0]["message"]
    assert KEY not in json.dumps(result) + said
    assert not any((tmp_path / "home").rglob("result.json"))
