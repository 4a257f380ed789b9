"""The template sandbox: what ordinary templates use works, and a hostile one is refused soon, by file and reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harmony_core.errors import TokenizationError
from harmony_core.text import chat_template
from harmony_core.text.chat_template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "<hi> é"},
    {"role": "assistant", "content": "yo", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]},
]


def render(source: str, add_generation_prompt: bool = False) -> str:
    template = ChatTemplate(source, "models/evil.jinja", {"bos_token": "<s>"})
    return template.render(MESSAGES, add_generation_prompt).text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}|{{ messages[0]['content'] | upper }}|{{ messages | length }}",
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{{ messages[1].tool_calls[0].function | tojson }}{{ messages[1].tool_calls | tojson(indent=2) }}",
        "{{ messages[1].tool_calls }}",
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.s = ns.s ~ m.role ~ ns.n %}{% endfor %}{{ ns.s }}",
        "{% macro one(m, tag='t') %}[{{ tag }}:{{ m.content | trim }}]{% endmacro %}{{ one(messages[0]) }}"
        "{{ one(messages[1], tag='u') }}",
        "{% set text %}{% for m in messages %}{{ m.content }};{% endfor %}{% endset %}{{ text | replace(';', ',') }}",
        "{{ messages[0].content.split(' ')[-1].strip() }}{{ 'a,b'.replace(',', '-') }}{{ ', '.join(['x', 'y']) }}",
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].role }}",
        "{{ '%s is %d' % ('a', 3) }}{{ '{} {k}'.format(1, k=2) }}{{ 7 // 2 * 3 - 1 % 4 + 2 ** 3 }}",
        "{{ 'a' in ['a', 'b'] }}{{ {'a': 1}.get('a') }}{{ (1, 2)[0] }}{{ dict(a=1).items() | list }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[::-1][0].role }}{{ missing }}",
        "{{ bos_token if add_generation_prompt is false else 'no' }}{{ tools is none }}{{ messages is iterable }}",
        "{% filter upper %}ab{% endfilter %}{{ 3.5 | int }}{{ range(3) | list }}{{ 'x' * 3 }}"
        "{{ none | default('d', true) }}",
        "{% generation %}a{% endgeneration %}{{ 'b' if messages[0].content is string and true }}"
        "{{ strftime_now('%%') }}",
        "{{ 'a\nb\n\nc' | indent }}{{ 'a\nb' | indent(2) }}{{ 'a\n\nb' | indent('> ', true, true) }}",
        "{{ '%s and %d' | format('a', 3) }}{{ range(7) | batch(3, 'x') | list }}{{ range(7) | slice(3) | list }}",
        "{{ 'some words that are long' | wordwrap(9) }}{{ 'abcdef' | wordwrap(2, wrapstring='|') }}",
        "{{ messages | pprint }}{{ '<a>' | forceescape }}{{ {'a': '<', 'b': none} | xmlattr }}{{ 'a' | center(9) }}",
        "{{ 5000 | filesizeformat }}{{ 'see www.example.org now' | urlize }}",
        "{% for m in messages if m.role == 'user' recursive %}{{ m.content }}{% endfor %}{{ '\\n' }}{{ \"it's\" | e }}",
    ],
)
def test_ordinary_templates_render_as_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template(conversations=[MESSAGES], chat_template=source, bos_token="<s>")
    assert render(source) == theirs[0]


def test_generation_blocks_are_spans_of_the_output() -> None:
    source = "{% for m in messages %}ab{% generation %}{{ m.content }}{% endgeneration %}c{% endfor %}"
    rendered = ChatTemplate(source, "t", {}).render(MESSAGES)
    assert [rendered.text[start:end] for start, end in rendered.generations] == ["<hi> é", "yo"]


LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"

HOSTILE = {
    "nested loops": LOOP * 3 + END * 3,
    "loops inside a condition": "{% for a in range(99999) if range(99999) | map('string') | list %}{% endfor %}",
    "much output": LOOP + "{{ 'x' * 100000 }}" + END,
    "much literal output": LOOP * 2 + "x" * 100 + END * 2,
    "output into a variable": "{% set x %}" + LOOP * 2 + "abcdefghij" * 10 + END * 2 + "{% endset %}",
    "a huge range": "{{ range(10 ** 9) }}",
    "a huge string": "{{ 'a' * 10 ** 7 * 10 ** 7 }}",
    "a huge list": "{{ [0] * 10 ** 8 }}",
    "a huge number": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a growing number": "{% set n = namespace(x=7) %}" + LOOP + "{% set n.x = n.x * n.x %}" + END,
    "a doubling string": "{% set n = namespace(s='a') %}" + LOOP + "{% set n.s = n.s + n.s %}" + END,
    "a doubling string, tilde": "{% set n = namespace(s='a') %}" + LOOP + "{% set n.s = n.s ~ n.s %}" + END,
    "a doubling list": "{% set n = namespace(s=[1]) %}" + LOOP + "{% set n.s = [n.s, n.s] %}" + END,
    "a doubling dict": "{% set n = namespace(s=1) %}" + LOOP + "{% set n.s = dict(a=n.s, b=n.s) %}" + END,
    "a shared part": "{{ range(99999) | map('default', 1) | list | map('replace', '', 'x' * 99999) | list }}",
    "replace": "{{ ('a' * 100000).replace('a', 'a' * 100000) }}",
    "the replace filter": "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "join": "{{ ('a' * 100000).join('b' * 100000) }}",
    "the join filter": "{{ ('b' * 100000) | join('a' * 100000) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format with an argument": "{{ '{:>{w}}'.format(1, w=10 ** 9) }}",
    "format many times": "{{ ('{0}' * 10000).format('a' * 100000) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent with an argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "padding": "{{ 'a'.ljust(10 ** 9) }}",
    "a padding filter": "{{ 'a' | center(10 ** 9) }}",
    "an indenting filter": "{{ ('a\n' * 100000) | indent(10 ** 6) }}",
    "an indenting text": "{{ ('a\n' * 100000) | indent('b' * 100000) }}",
    "a wrapping filter": "{{ ('a' * 100000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "a format filter": "{{ '%999999999d' | format(1) }}",
    "a format filter with a text": "{{ ('%s' * 9999) | format('a' * 99999) }}",
    "a batch": "{{ [1] | batch(10 ** 8, 'x') | list }}",
    "slices": "{{ [1] | slice(10 ** 8) | list }}",
    "pretty depth": "{% set n = namespace(s=[1]) %}" + LOOP + "{% set n.s = [n.s, 'a'] %}{{ n.s | pprint }}" + END,
    "chance": "{{ [1, 2] | random }}",
    "indent": "{{ {'a': 1} | tojson(indent=10 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "itself": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": LOOP * 60 + END * 60,
    "a long source": "x" * (chat_template.MAX_SOURCE + 1),
    "class": "{{ ''.__class__.__mro__ }}",
    "init": "{{ self.__init__.__globals__ }}",
    "a global": "{{ cycler.__init__.__globals__.os }}",
    "a namespace's class": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "the messages": "{{ messages.append(1) }}",
    "a message": "{{ messages[0].update({'role': 'x'}) }}",
    "a file": "{% include '/etc/hostname' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a division": "{{ 1 / 0 }}",
    "its own refusal": "{{ raise_exception('I refuse') }}",
    "a syntax error": "{% for %}",
}


@pytest.mark.timeout(60, method="signal")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_by_file_and_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SPENT", 16 * 1024 * 1024)
    with pytest.raises(TokenizationError, match=r"^models/evil\.jinja: chat template: .+") as refusal:
        render(HOSTILE[name])
    assert len(str(refusal.value)) < 700
    if name == "its own refusal":
        assert str(refusal.value).endswith("I refuse")


@pytest.mark.parametrize(
    "source", ["{{ ''['__class__'] }}", "{{ raise_exception.__globals__ }}", "{{ 'a'|attr('__class__') }}"]
)
def test_what_is_hidden_is_empty(source: str) -> None:
    assert re.sub("a", "", render(source)) == ""


@pytest.mark.timeout(60, method="signal")
def test_time_ends_a_template_that_is_slow_without_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(TokenizationError, match=r"runs for more than 0\.2 s"):
        render("{{ ([range(99999)] * 999) | map('sum') | list }}")


def test_output_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_OUTPUT", 1000)
    assert len(render("{{ 'x' * 1000 }}")) == 1000
    with pytest.raises(TokenizationError, match="writes more than 1000 characters"):
        render("{{ 'x' * 1001 }}")


def test_a_long_conversation_is_within_the_budget() -> None:
    source = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim + '<|end|>' }}\n{% endfor %}"
    messages = [{"role": "user", "content": "word " * 20}] * 10_000 + [{"role": "user", "content": "x" * 8_000_000}]
    assert len(ChatTemplate(source, "t", {}).render(messages).text) > 9_000_000
