"""Infinite, huge and negative numbers are refused where they are parsed, with the flag, the value and the range."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harmony_core.recipe import built_in_recipes, load_recipe

HUGE = "1" * 400


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--seed", value) for value in ("-1", "99999999999999999999", HUGE)],
        *[("--timeout", value) for value in ("-3", "0", "99999999999999999999", f"{HUGE}d")],
        *[("--memory", value) for value in ("0", HUGE, "99999999TiB")],
        *[("--assume", value) for value in (HUGE, f"{HUGE}x80GiB", "0x80GiB", f"8x{HUGE}")],
        *[("--num-processes", value) for value in ("0", "99999999999999999999")],
        *[("--keep-checkpoints", value) for value in ("-1", "99999999999999999999")],
        *[(f"--{name}", value) for name in ("epochs", "lr") for value in ("inf", "nan", "-1", "1e999", HUGE)],
        *[("--samples-per-batch", value) for value in ("0", "1e30", HUGE)],
        ("--tp", "100000"),
    ],
)
def test_a_value_out_of_its_range_is_refused(adaptive: Any, flag: str, value: str) -> None:
    done = adaptive("run", "sft", "--dry-run", flag, value)
    (line, *_) = done.errors
    assert (done.code, done.out) == (2, "")
    assert flag in line and "allowed: " in line
    shown = "inf" if value == "1e999" else str(float(value)) if value == "1e30" else value
    assert shown.removeprefix("8x")[:15] in line and len(line) < 300


def test_a_file_names_place_value_and_range(adaptive: Any) -> None:
    Path("c.yaml").write_text("epochs: .inf\nseed: -5\nlr: .nan\nsamples_per_batch: 1e99\n")
    done = adaptive("config", "show", "sft", "-c", "c.yaml")
    assert done.code == 2
    for number, (place, value) in enumerate((("epochs", "inf"), ("seed", "-5"), ("lr", "nan"), ("samples", "1e+99"))):
        assert f"c.yaml:{number + 1}:" in done.errors[number] and f"got {value} (allowed: " in done.errors[number]
        assert place in done.errors[number]
    done = adaptive("run", "hello.py", "--threshold", "inf", "--dry-run")
    assert done.code == 2 and "--threshold: Input should be a finite number" in done.errors[0]


@pytest.mark.parametrize("name", sorted(built_in_recipes()))
def test_every_number_of_our_recipes_has_bounds(name: str) -> None:
    def numbers(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in numbers(item, path)]
        if not isinstance(node, dict):
            return []
        open_below = "minimum" not in node and "exclusiveMinimum" not in node
        open_above = "maximum" not in node and "exclusiveMaximum" not in node
        own = [path] if node.get("type") in ("integer", "number") and (open_below or open_above) else []
        return own + [found for key, value in node.items() for found in numbers(value, f"{path}/{key}")]

    assert numbers(load_recipe(name).json_schema["properties"], "") == []


def test_what_the_platform_gives_a_recipe_is_read_below_everything_else(
    adaptive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER_INPUT_JSON", '{"union_variant": "Config", "lr": 0.5, "note": "n"}')
    Path("c.yaml").write_text("note: y\n")
    done = adaptive("config", "show", "hello.py", "-c", "c.yaml", "--sources")
    assert re.search(r"^lr +0\.5 +# \$USER_INPUT_JSON", done.out, re.MULTILINE)
    assert re.search(r'^note +"y" +# c\.yaml', done.out, re.MULTILINE)
    Path("input.json").write_text('{"lr": 0.25}')
    monkeypatch.setenv("ADAPTIVE_USER_INPUT_FILE", "input.json")
    done = adaptive("config", "show", "hello.py", "--json")
    assert done.json["config"]["lr"] == 0.25 and done.json["config"]["note"] == ""
    monkeypatch.setenv("ADAPTIVE_USER_INPUT_FILE", "missing.json")
    assert adaptive("run", "hello.py", "--dry-run").code == 3
    monkeypatch.delenv("ADAPTIVE_USER_INPUT_FILE")
    monkeypatch.setenv("USER_INPUT_JSON", '{"lrr": 1}')
    done = adaptive("run", "hello.py", "--dry-run")
    assert done.code == 2 and "$USER_INPUT_JSON" in done.errors[0] and "lrr" in done.errors[0]
