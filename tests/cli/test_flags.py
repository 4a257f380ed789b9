"""A recipe's configuration from files, the environment and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_precedence_and_positions_of_the_recipe_word(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.yaml").write_text("lr: 0.1\nlora: {r: 1, alpha: 1}\nnote: a\n")
    Path("b.yaml").write_text("lr: 0.2\nlora: {alpha: 2}\n")
    monkeypatch.setenv("ADAPTIVE_CFG__LORA__ALPHA", "3")
    words = ["config", "show", "--lora.alpha", "4", "--lr", "0.5", "hello.py", "-c", "a.yaml", "-c", "b.yaml", "--json"]
    done = adaptive(*words)
    assert done.code == 0
    assert done.json["config"]["lr"] == 0.5
    assert done.json["config"]["lora"] == {"r": 1, "alpha": 4.0}
    assert done.json["sources"]["lora.r"] == "a.yaml:2:11"
    assert done.json["sources"]["lr"] == "--lr"
    assert done.json["sources"]["kind"] == "default"
    assert adaptive(*words[:2], *words[6:]).json["sources"]["lora.alpha"] == "$ADAPTIVE_CFG__LORA__ALPHA"
