"""Keys of external models, and what is checked of them before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony_core.config.parameters import Model, model_kinds
from harmony_core.errors import ModelRefused, ResourceError, UsageError
from harmony_core.external import address as addresses
from harmony_core.external.address import Address
from harmony_core.home import Home
from harmony_core.registry import Registry


def test_keys_are_read_and_written_alike() -> None:
    for key in (
        "openai://gpt-4o",
        "anthropic://Claude-Opus",
        "openai://meta-llama/Llama-3.1-8B:free?base_url=http://127.0.0.1:8000/v1",
    ):
        found = Address.parse(key)
        assert found is not None and found.key == key
    assert Address.parse("model_registry://tiny") is None and Address.parse("builtin:tiny-lm") is None


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("google://gemini", "not a provider"),
        ("openai://m?api_key=sk-secret-value", "OPENAI_API_KEY"),
        ("anthropic://m?api_key=", "ANTHROPIC_API_KEY"),
        ("openai://", "name is missing"),
        ("openai://m?temprature=1", "it cannot have temprature"),
        ("openai://m?base_url=ftp://host/v1", "base_url must be"),
        ("openai://m?base_url=https://me:sk-secret-value@host/v1", "base_url must be"),
        ("openai://m?base_url=https:///v1", "base_url must be"),
    ],
)
def test_bad_keys_are_refused_without_showing_secrets(key: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        Address.parse(key)
    assert "sk-secret" not in str(caught.value)


def test_models_are_checked_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(Home.open(tmp_path))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ResourceError, match="OPENAI_API_KEY is not set") as caught:
        Model("openai://GPT-4o").check(registry)
    assert caught.value.exit_code == 4
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    assert Model("openai://GPT-4o").check(registry) == Address("openai://GPT-4o", "openai", "GPT-4o", "")
    with pytest.raises(ModelRefused, match="cannot be trained"):
        Model[model_kinds.Trainable]("openai://GPT-4o").check(registry)
    monkeypatch.setitem(addresses.HOSTS, "not_installed", "https://host")
    with pytest.raises(ResourceError, match=r"not_installed, which is not installed\nhint: .*harmony-core\[not_inst"):
        Model("not_installed://m").check(registry)
