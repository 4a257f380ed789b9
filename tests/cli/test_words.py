"""Which word names the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from harmony_core.cli.app import recipe_word


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("run sft", "sft"),
        ("run r.py --lr 1", "r.py"),
        ("run --lr 1 r.py", "r.py"),
        ("run --lr 1 sft", "sft"),
        ("run --shuffle sft", "sft"),
        ("run --lr=1 sft", "sft"),
        ("run -c a.yaml sft", "sft"),
        ("run --config other.py sft", "sft"),
        ("run --seed 3 r.py:main", "r.py:main"),
        ("run run", "run"),
        ("config show sft", "sft"),
        ("config schema sft", "sft"),
        ("run", None),
        ("run --help", None),
    ],
)
def test_recipe_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, word: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.py").touch()
    Path("other.py").touch()
    assert recipe_word(line.split()) == word
