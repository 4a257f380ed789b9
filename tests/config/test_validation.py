"""Problems: all of them, each at the place where it was written, with what was probably meant."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

GOOD = """\
model: m
judge: j
lr: 0.1
steps: 5
schedule: linear
shuffle: false
seeds: [1, 2]
weights: {a: 0.5}
items:
  - path: p
    weight: 2
lora:
  r: 4
  alpha: 2
  targets: [q]
algo:
  union_variant: Dpo
  beta: 0.5
note: n
"""


def _places(text: str) -> list[tuple[tuple[Any, ...], int]]:
    """Every key with its line, by PyYAML's own composer."""
    found: list[tuple[tuple[Any, ...], int]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found.append(((*path, key.value), key.start_mark.line))
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, index))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found


def test_the_good_one_is_good(configure: Any) -> None:
    assert configure(GOOD).items[0].weight == 2


@pytest.mark.parametrize("place", _places(GOOD), ids=lambda p: ".".join(map(str, p[0])))
def test_every_misspelt_key_is_reported_at_its_line(configure: Any, place: Any) -> None:
    path, line = place
    if path[0] == "weights" and len(path) == 2:
        pytest.skip("a free key")
    lines = GOOD.splitlines()
    name = path[-1]
    lines[line] = lines[line].replace(f"{name}:", f"{name}x:", 1)
    issues = configure.issues("\n".join(lines))
    assert any(issue.startswith(f"0.yaml:{line + 1}:") and f"{name}x" in issue for issue in issues)
    assert len(issues) == 1 or name in ("union_variant", "path")


def test_all_at_once_in_reading_order(configure: Any) -> None:
    text = "modl: m\nlr: -1\nlora:\n  rr: 3\n  r: abc\nmixed: {a: 1}\nseeds: 5\nweights: {a: x}\nsteps: null\nlr: 3\n"
    assert configure.issues(text, "--stepz=5", "--lora.alpha=x", "--weights.b=") == [
        "0.yaml:1:1: modl: unknown key (did you mean model?)",
        "0.yaml:2:5: lr: Input should be greater than 0, got -1 (allowed: > 0)",
        "0.yaml:4:3: lora.rr: unknown key (did you mean r?)",
        "0.yaml:5:6: lora.r: Input should be a valid integer, unable to parse string as an integer, got 'abc'"
        " (allowed: >= 1)",
        "0.yaml:6:8: mixed: Input should be int|list[str]",
        "0.yaml:7:8: seeds: Input should be a valid list, got 5",
        "0.yaml:8:14: weights.a: Input should be a valid number, unable to parse string as a number, got 'x'",
        "0.yaml:9:8: steps: Input should be a valid integer, got null",
        "0.yaml:10:1: lr: duplicate key (first at line 2)",
        "--stepz: unknown key (did you mean steps?)",
        "--weights.b: Input should be a valid number, got null",
        "--lora.alpha: Input should be a valid number, unable to parse string as a number, got 'x'",
    ]


def test_a_required_value_says_how_to_give_it(configure: Any) -> None:
    (issue,) = configure.issues("lr: 1")
    assert issue == "model: a value is required; give --model or set it in a YAML file"
    (issue,) = configure.issues("model: m\nitems:\n  - {weight: 1}\n")
    assert issue == "0.yaml:3:5: items.0.path: a value is required"


def test_unknown_keys_are_errors_in_plain_models_too(configure: Any) -> None:
    # Lora and Item are plain pydantic models, which take anything by themselves.
    (issue,) = configure.issues("model: m\nitems: [{path: a, wieght: 1}]")
    assert issue == "0.yaml:2:19: items.0.wieght: unknown key (did you mean weight?)"


def test_a_key_from_another_level_is_named(configure: Any) -> None:
    (issue,) = configure.issues("model: m\nbeta: 1")
    assert issue == "0.yaml:2:1: beta: unknown key (did you mean algo.beta?)"


def test_tags_of_unions(configure: Any) -> None:
    (issue,) = configure.issues("model: m\nalgo: {beta: 1}")
    assert "0.yaml:2:7: algo: the block must say which it is" in issue
    (issue,) = configure.issues("model: m\nalgo: {union_variant: Dppo}")
    assert "'Grpo', 'Dpo'" in issue


def test_errors_of_a_flag_are_not_blamed_on_the_file(configure: Any) -> None:
    (issue,) = configure.issues("model: m\nlora: {r: 1}", "--lora.r=0")
    assert issue == "--lora.r: Input should be greater than or equal to 1, got 0 (allowed: >= 1)"


def test_garbled_text_is_an_error_or_a_configuration(configure: Any) -> None:
    """Random edits of a good file: never another exception, never a hang."""
    import random

    from harmony_core.errors import ConfigError

    rng = random.Random(7)
    alphabet = "abr: -[]{}#&*!|>'\"%@`,?\n\t\x00\x7f0.1eü~<"
    good = bad = 0
    for _ in range(400):
        text = list(GOOD)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 3)] = rng.choice(alphabet) * rng.randint(0, 2)
        try:
            configure("\n" + "".join(text))
            good += 1
        except ConfigError as error:
            bad += 1
            assert error.issues
    assert good >= 5
    assert bad > 100
