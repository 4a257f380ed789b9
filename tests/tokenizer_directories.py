"""Small tokenizer directories, written with the `tokenizers` library, with templates shaped like the families'."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "{%- for message in messages -%}"
    "{%- set piece = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' -%}"
    "{%- if loop.index0 == 0 -%}{%- set piece = bos_token + piece -%}{%- endif -%}{{- piece -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)

QWEN2 = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' ~ '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

QWEN3 = """\
{%- set ns = namespace(last_query = messages|length - 1, searching = true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set answer = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + answer }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL_TOOLS = """\
{%- set first = messages[0] %}
{%- set rest = messages[1:] if first["role"] == "system" else messages %}
{%- set asked = rest | selectattr("role", "equalto", "user") | list %}
{%- set state = namespace(turn=0) %}
{%- for message in rest %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (state.turn % 2 == 0) %}
            {{- raise_exception("roles must alternate after the system message") }}
        {%- endif %}
        {%- set state.turn = state.turn + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is defined and tools is not none and message == asked[-1] %}
            {{- "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- set before = first["content"] + "\\n\\n" if loop.last and first["role"] == "system" else "" %}
        {{- "[INST] " + before + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles, and a first system message") }}
    {%- endif %}
{%- endfor %}
"""
"""The later Mistrals': the system message stands in the last turn if that is the user's, and else nowhere."""

GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set opening, rest = messages[0]['content'] + '\\n\\n', messages[1:] -%}
{%- else -%}
    {%- set opening, rest = '', messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- opening if loop.first else '' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""The system message opens the first turn."""

SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small helpful model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""The prompt begins a thought that the rendered conversation does not have; the blocks say what the model writes."""

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": (LLAMA3, "<|eot_id|>", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen2": (QWEN2, "<|im_end|>", {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}),
    "qwen3": (QWEN3, "<|im_end|>", {"eos_token": "<|im_end|>"}),
    "mistral": (MISTRAL, "</s>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "mistral-tools": (MISTRAL_TOOLS, "</s>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma": (GEMMA, "<end_of_turn>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma3": (GEMMA3, "<end_of_turn>", {"bos_token": "<s>", "eos_token": "<end_of_turn>"}),
    "smollm2": (SMOLLM2, "<|im_end|>", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "chatml": (CHATML, "<|im_end|>", {"eos_token": "<|im_end|>"}),
}
"""name -> (template, its end-of-turn token, the special tokens of tokenizer_config.json)"""

SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<unk>"),
)
THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

_CORPUS = [
    "system\nuser\nassistant\nYou are a helpful assistant. What is the capital of Peru? The capital is Lima.\n\n",
    "The quick brown fox jumps over the lazy dog, again and again; 12 + 30 = 42. Is it so? It is!\n\n\n",
    "naïve café, 你好, emoji 🙂 and more words that the small vocabulary will merge into whole words words words",
]


def byte_level() -> Tokenizer:
    """Bytes merged by BPE, as Llama 3, Qwen and SmolLM2 have it, with the post-processor that trims offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\w]?\w+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    return _with_specials(tokenizer)


def metaspace() -> Tokenizer:
    """Words that begin with ▁, as Mistral and Gemma have it, with a space put before every stretch of text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*string.printable, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in _CORPUS * 3], trainer)
    return _with_specials(tokenizer)


def write(
    directory: Path,
    template: str | None,
    specials: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    files: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A tokenizer directory; `files` are further JSON files, `config` further entries of tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **specials, **config}
    if template is not None:
        settings["chat_template"] = template
    for name, value in {"tokenizer_config.json": settings, **(files or {})}.items():
        (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return directory


def family(directory: Path, name: str) -> Path:
    """The tokenizer directory of one of FAMILIES."""
    template, _, specials = FAMILIES[name]
    return write(directory, template, specials, metaspace() if name.startswith("mistral") else byte_level())


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THOUGHTS])
    return tokenizer
