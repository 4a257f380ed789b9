"""Grader keys: stored files, records of judges, and what a configuration may name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harmony_core.errors import ConfigError, ConflictError, NotFoundError, UsageError, VerificationError
from harmony_core.graders import BaseGrader, Grader, GraderRegistry, RewardServerGrader, score_or_refuse
from harmony_core.graders.records import AdaptiveGrader, CustomJudge, FunctionConfig, read_config
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread

SAMPLE = StringThread([("user", "q"), ("assistant", "abc")])
JUDGE = """\
type: Judge
model_key: builtin:tiny-lm
criteria: It is polite.
examples:
- input: [{role: user, content: hi}]
  output: hello
  pass: true
  reasoning: a greeting
"""


def test_a_stored_grader_is_a_copy_with_its_digest(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def reward(thread):\n    return len(thread.completion())\n")
    known = GraderRegistry(registry.home)
    assert known.add("team/length", f"{file}:reward").function == "reward"
    file.unlink()
    assert known.names()[0] == "team/length"
    grader = asyncio.run(known.find("team/length").load(None))
    assert asyncio.run(score_or_refuse(grader, SAMPLE)) == 3.0 and grader.grader_key == "team/length"
    file.write_text("def reward(thread): return 1\n")
    with pytest.raises(ConflictError, match="already"):
        known.add("team/length", str(file))
    assert not list(registry.home.staging.iterdir())
    copy = registry.home.path / "graders" / "team@length" / "mine.py"
    copy.write_text("def reward(thread): return 0\n")
    with pytest.raises(VerificationError, match=r"mine\.py is not the file that was added"):
        known.find("team/length")
    known.remove("team/length")
    with pytest.raises(NotFoundError):
        known.remove("team/length")
    for key, source, error in (("Bad Key", str(file), UsageError), ("a", "b.txt", UsageError), ("a", "b.py", None)):
        with pytest.raises(error or NotFoundError):
            known.add(key, source)


def test_a_judge_is_described_by_a_file_and_all_its_problems_are_told(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text(JUDGE)
    config = read_config(file)
    assert isinstance(config, CustomJudge) and config.examples[0].passes
    assert config.examples[0].thread().completion() == "hello"
    GraderRegistry(registry.home).add("polite", str(file))
    assert Grader(grader_key="polite").check(registry).model_key == "builtin:tiny-lm"
    file.write_text(JUDGE.replace("builtin:tiny-lm", "builtin:tiny-ml"))
    with pytest.raises(NotFoundError, match="tiny-ml"):
        Grader(grader_key=str(file)).check(registry)
    file.write_text(JUDGE.replace("pass: true", "pass: maybe").replace("criteria", "critera"))
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert len(caught.value.issues) == 2
    assert all("judge.yaml:" in issue for issue in caught.value.issues)
    file.write_text("type: Juge\n")
    with pytest.raises(UsageError, match="type is 'Juge'") as unknown:
        read_config(file)
    assert "Judge" in unknown.value.hint


def test_a_grader_is_built_from_its_record() -> None:
    def built(**config: object) -> BaseGrader[object]:
        record = AdaptiveGrader.model_validate({"key": "k", "config": config})
        assert record.grader_id == AdaptiveGrader.model_validate({"key": "k", "config": config}).grader_id
        return asyncio.run(BaseGrader.from_config(record, None))  # type: ignore[arg-type]

    remote = built(type="Remote", url="http://127.0.0.1:1")
    assert isinstance(remote, RewardServerGrader) and remote.client.base_url == "http://127.0.0.1:1"
    source = "async def grade(thread):\n    return 2 * len(thread.completion())"
    assert asyncio.run(score_or_refuse(built(type="Function", source_code=source), SAMPLE)) == 6.0
    for config in ({"type": "Custom"}, FunctionConfig().model_dump()):
        with pytest.raises(ValueError, match="only a recipe can build it"):
            built(**config)
