"""Templates and end tokens that do not work are refused when a model is added, with a way out that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import TokenizationError, UsageError
from harmony_core.model.weight_files import TEMPLATES
from harmony_core.registry import Registry
from harmony_core.text import tokenizer_files

FINE = "{% for m in messages %}{{ m.content | indent(2) }}{% endfor %}"


def described(directory: Path, **config: Any) -> str:
    small_models.write_json(directory / "tokenizer_config.json", config)
    return str(directory)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "endfor"),
        ("{{ messages | shout }}", "No filter named 'shout'"),
        ("{{ messages[0].content }}{% if tools %}{{ tools | shout }}{% endif %}", "the filter 'shout'"),
        ("{% if tools is shouted %}{% endif %}{{ messages[0].content }}", "No test named|the test 'shouted'"),
        ("{{ messages[0].content }}{% if tools %}{{ today() }}{% endif %}", "the function 'today'"),
        ("{{ date.year }}{{ messages[0].content }}", "'date' is undefined"),
        ("{{ messages[0].content[0].text.strip() }}", "has no attribute|undefined"),
        ([{"name": "rag", "template": FINE}], "no entry named 'default'"),
        ([{"name": "default", "template": FINE}, {"name": "tool_use", "template": "{{ a | shout }}"}], "'shout'"),
        ([{"name": "default", "template": FINE}, {"name": "tool_use"}], "must be a string"),
        (7, "must be a string"),
    ],
)
@pytest.mark.parametrize("reference", [False, True])
def test_a_template_that_does_not_work(
    registry: Registry, source: Path, template: Any, reason: str, reference: bool
) -> None:
    with pytest.raises(TokenizationError, match=reason) as refused:
        registry.add("m", described(source, chat_template=template), reference=reference)
    assert "--chat-template FILE" in refused.value.hint and not registry.versions("m")
    (source.parent / "fine.jinja").write_text(FINE)
    assert registry.add("m", str(source), chat_template=source.parent / "fine.jinja").ref == "m@1", "the way out"


@pytest.mark.parametrize(
    "template",
    [
        FINE,
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        "{% if today is defined %}{{ today() }}{% endif %}{{ messages[0].content }}",
        "{% macro shown(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ shown(m) }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{{ strftime_now('%Y') }}{{ tools | tojson }}{{ messages[0].content }}",
        "{% macro row() %}{{ caller() }}{% endmacro %}{% call row() %}{{ messages[0].content }}{% endcall %}",
    ],
)
def test_a_template_that_works_or_refuses_by_itself(registry: Registry, source: Path, template: str) -> None:
    assert registry.add("m", described(source, chat_template=template)).ref == "m@1"


def test_the_template_for_tools_goes_with_the_model(registry: Registry, source: Path) -> None:
    for name in TEMPLATES.values():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(FINE + name)
    version = registry.add("m", str(source))
    with registry.stage() as staging:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name, staging.directory / name)
        saved = staging.publish("saved", parent=version)
    for path in (version.path, saved.path, registry.add("there", str(source), reference=True).path):
        template = tokenizer_files.read(path).template
        assert template is not None and [choice.source for choice in template.choices] == [
            FINE + name for name in TEMPLATES.values()
        ]
    registry.verify("saved")
    (source.parent / "other.jinja").write_text(FINE)
    replaced = registry.add("other", str(source), chat_template=source.parent / "other.jinja")
    assert not (replaced.path / TEMPLATES["tool_use"]).exists()
    (source / TEMPLATES["tool_use"]).write_text("{{ messages | shout }}")
    with pytest.raises(TokenizationError, match=r"tool_use.jinja: .*'shout'"):
        registry.add("bad", str(source))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [99, [1, 99], [1, 11]])
def test_an_end_token_that_does_not_exist(registry: Registry, source: Path, name: str, ids: Any) -> None:
    path = source / name
    known = json.loads(path.read_text()) if path.exists() else {}
    small_models.write_json(path, known | {"eos_token_id": ids})
    if ids == [1, 11]:
        assert registry.add("m", str(source)).ref == "m@1"
        return
    with pytest.raises(
        TokenizationError, match="eos_token_id 99 is no token: the tokenizer has 12 and the model 12"
    ) as no:
        registry.add("m", str(source))
    assert "correct eos_token_id" in no.value.hint


def test_variables_are_checked_when_they_are_set(registry: Registry, source: Path, tmp_path: Path) -> None:
    registry.add("m", described(source, chat_template=FINE + "{{ enable_thinking }}"))
    with pytest.raises(UsageError, match=r"does not read 'enable_thinkin'; did you mean enable_thinking\?"):
        registry.set_defaults("m", {"chat_template_kwargs": {"enable_thinkin": False}})
    assert registry.resolve("m").defaults.chat_template_kwargs is None
    registry.set_defaults("m", {"chat_template_kwargs": {"enable_thinking": False}})
    bare = small_models.write_model(tmp_path / "bare", with_tokenizer=False)
    registry.add("bare", str(bare))
    with pytest.raises(UsageError, match="bare@1 has no tokenizer"):
        registry.set_defaults("bare", {"chat_template_kwargs": {"enable_thinking": False}})
