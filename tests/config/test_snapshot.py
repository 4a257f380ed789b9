"""A saved configuration gives the same configuration again."""

from __future__ import annotations

from typing import Any

from harmony_core.config import as_data, as_yaml, load_yaml, sources_of


def test_round_trip(configure: Any) -> None:
    tricky = [
        "1e-5",
        "007",
        "null",
        "on",
        "12:30",
        "a: b",
        "# no",
        "line\nbreak\n",
        " lead",
        "ünï",
        "\x01",
        "'",
        "100_000",
        "-",
    ]
    config = configure("model: m\nlora: {r: 3}", "--weights={a: 1e-5, b: 1e300}")
    config = config.model_copy(update={"mixed": tricky, "note": "two\nlines"})
    text = as_yaml(as_data(config))
    document = load_yaml(text, "config.yaml")
    assert document.issues == []
    assert document.data == as_data(config)
    assert as_yaml(as_data(configure(text))) == text


def test_sources_of_every_leaf(configure: Any) -> None:
    resolved = configure.resolve("model: m\nlora: {r: 3}\nitems: [{path: a}]", "--weights={a: 1}")
    data = as_data(configure("model: m\nlora: {r: 3}\nitems: [{path: a}]", "--weights={a: 1}"))
    found = sources_of(data, resolved)
    assert found["model"] == "0.yaml:1:8"
    assert found["lora.r"] == "0.yaml:2:11"
    assert found["lora.alpha"] == found["steps"] == found["items.0.weight"] == "default"
    assert found["items.0.path"] == "0.yaml:3:16"
    assert found["weights.a"] == "--weights"
    assert "lora" not in found
