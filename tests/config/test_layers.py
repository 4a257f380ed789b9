"""What a value means by where and how it was written, and which layer wins."""

from __future__ import annotations

from typing import Any

import pytest

from harmony_core.config import Assignment, Source, assignments_from_env


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--lr=1e-3", "lr", 1e-3),
        ("--lr=.5", "lr", 0.5),
        ("--steps=7", "steps", 7),
        ("--steps=-1", "steps", -1),
        ("--schedule=linear", "schedule", "linear"),
        ("--shuffle=false", "shuffle", False),
        ("--note=on", "note", "on"),
        ("--note=007", "note", "007"),
        ("--note=null", "note", "null"),
        ("--note=", "note", ""),
        ("--note={a: 1}", "note", "{a: 1}"),
        ("--note=ünï: cödé", "note", "ünï: cödé"),
        ("--model=@key: x", "model", "@key: x"),
        ("--judge=null", "judge", None),
        ("--judge=key@3", "judge", "key@3"),
        ("--seeds=5", "seeds", [5]),
        ("--seeds=5,6", "seeds", [5, 6]),
        ("--seeds=[5, 6]", "seeds", [5, 6]),
        ("--seeds=", "seeds", []),
        ("--weights={acc: .5}", "weights", {"acc": 0.5}),
        ("--weights.a-b=2", "weights", {"a-b": 2.0}),
        ("--lora=null", "lora", None),
        ("--mixed=5", "mixed", 5),
        ("--mixed=a,b", "mixed", ["a", "b"]),
        ("--mixed=a", "mixed", ["a"]),
    ],
)
def test_text_is_read_as_the_schema_wants_it(configure: Any, flag: str, field: str, value: Any) -> None:
    config = configure("model: m", flag)
    found = getattr(config, field)
    assert found == value
    assert type(found) is type(value) or field == "schedule"


def test_later_layers_win_and_maps_merge(configure: Any) -> None:
    first = "model: m\nlora: {r: 2, alpha: 3}\nseeds: [1, 2, 3]\nweights: {a: 1, b: 1}\nsteps: 1"
    second = "lora: {r: 4}\nseeds: [9]\nweights: {b: 2}\nsteps: 2"
    env = assignments_from_env({"ADAPTIVE_CFG__LORA__TARGETS": "k", "ADAPTIVE_CFG__STEPS": "3", "OTHER": "x"})
    config = configure(first, second, *env, "--steps=4")
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (4, 3, ["k"])
    assert config.seeds == [9]
    assert config.weights == {"a": 1, "b": 2}
    assert config.steps == 4


def test_every_leaf_remembers_its_source(configure: Any) -> None:
    env = assignments_from_env({"ADAPTIVE_CFG__LR": "1"})
    resolved = configure.resolve("model: m\nlora:\n  r: 2\n", "steps: 3\n", *env, "--lora.alpha=5", "--steps=100")
    sources = {path: str(source) for path, source in resolved.sources.items()}
    assert sources[("model",)] == "0.yaml:1:8"
    assert sources[("lora", "r")] == "0.yaml:3:6"
    assert sources[("lr",)] == "$ADAPTIVE_CFG__LR"
    assert sources[("lora", "alpha")] == "--lora.alpha"
    # The default, typed by the user, is the user's.
    assert sources[("steps",)] == "--steps"


def test_a_partly_given_block_keeps_the_fields_default(configure: Any) -> None:
    # The field's default is Lora(alpha=1); the class's own alpha is 32.
    assert configure("model: m\nlora: {r: 8}").lora.alpha == 1
    assert configure("model: m", "--lora.r=8").lora.alpha == 1
    assert configure("model: m", "--lora={r: 8}").lora.alpha == 32
    assert configure("model: m", "--lora=null", "--lora.r=5").lora.r == 5


def test_items_of_lists(configure: Any) -> None:
    text = "model: m\nitems: [{path: a}, {path: b}]"
    assert configure(text, "--items.1.path=c").items[1].path == "c"
    assert len(configure(text, "--items.2.path=c").items) == 3
    assert configure("model: m", "--items.0.path=c").items[0].path == "c"
    assert configure.issues(text, "--items.5.path=c") == ["--items.5.path: the list has 2 items"]


def test_variants_are_switched_as_a_whole(configure: Any) -> None:
    assert configure("model: m", "--algo.union-variant=Dpo", "--algo.beta=.5").algo.beta == 0.5
    assert configure("model: m\nalgo: {union_variant: Grpo, group: 2}", "--algo={union_variant: Dpo}").algo.beta == 0.1
    (issue,) = configure.issues("model: m\nalgo: {union_variant: Grpo, group: 2}", "--algo.union-variant=Dpo")
    assert issue.startswith("0.yaml:2:29: algo.group: belongs to Grpo")
    assert "--algo '{...}'" in issue


def test_kebab_case_is_for_flags_only(configure: Any) -> None:
    assert configure("model: m", "--algo.union-variant=Dpo").algo.union_variant == "Dpo"
    (issue,) = configure.issues("model: m\nalgo: {union-variant: Dpo, union_variant: Dpo}")
    assert issue == "0.yaml:2:8: algo.union-variant: unknown key (did you mean union_variant?)"


def test_an_assignment_needs_a_key_and_a_value() -> None:
    for text in ("lr", "=5", "a..b=1"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            Assignment.parse(text, Source("flag", "--set"))


def test_a_document_is_not_changed_by_the_layers_above_it(configure: Any) -> None:
    from harmony_core.config import load_yaml

    document = load_yaml("model: m\nlora: {r: 2}\nitems: [{path: a}]", "f.yaml")
    configure.resolve(document, "--lora.r=9", "--items.0.path=z", "--items.1.path=z")
    assert document.data == {"model": "m", "lora": {"r": 2}, "items": [{"path": "a"}]}
