"""Template variables: what reaches the template, which of several values wins, and what is told of the unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tokenizer_directories as directories
from engines import LiveEngine
from harmony_core.config.parameters import Model
from harmony_core.errors import DataError, UsageError
from harmony_core.text import tokenizer_files
from harmony_core.text.threads import StringThread
from harmony_core.text.tokenization import ChatTokenizer

THINKING = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}/no_think{% endif %}" + directories.CHATML
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": "é"}}}]
QUESTION = StringThread([("user", "q")])


def load(directory: Path, template: str = THINKING, **variables: Any) -> ChatTokenizer:
    written = directories.write(directory, template, {"eos_token": "<|im_end|>", "bos_token": "<s>"})
    return ChatTokenizer(tokenizer_files.read(written), variables)


def prompt(tokenizer: ChatTokenizer, thread: StringThread = QUESTION) -> str:
    return tokenizer.decode(tokenizer.prompt_ids(thread))


def test_prompts_and_training_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for given in ({}, {"enable_thinking": False}, {"tools": TOOLS}, {"tools": TOOLS, "bos_token": "<unk>"}):
        thread = QUESTION.assistant("a").with_template_kwargs(**given)
        messages = [{"role": role, "content": content} for role, content in thread.get_turns()]
        options: dict[str, Any] = {"return_dict": False, **given}
        assert ours.tokenize(thread).token_ids == theirs.apply_chat_template(messages, **options)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, **options)
        assert ours.prompt_ids(thread) == expected
    assert prompt(ours) != prompt(ours, QUESTION.with_template_kwargs(enable_thinking=False)), "each has its own prompt"


@pytest.mark.parametrize("as_files", [False, True])
def test_a_template_of_its_own_for_tools(as_files: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = {"default": directories.CHATML, "tool_use": THINKING, "rag": "{{ documents }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    directories.write(tmp_path, None, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, chat_template=listed)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if as_files:
        theirs.save_pretrained(tmp_path)
        assert (tmp_path / "additional_chat_templates" / "rag.jinja").is_file()
    files = tokenizer_files.read(tmp_path)
    plain = [prompt(ChatTokenizer(files, {"tools": given})) for given in (TOOLS, [])]
    for ours, of_model in ((ChatTokenizer(files), None), (ChatTokenizer(files, {"tools": TOOLS}), TOOLS)):
        for given in ({}, {"tools": None}, {"tools": []}, {"tools": TOOLS}, {"tools": TOOLS, "enable_thinking": False}):
            thread = QUESTION.assistant("a").with_template_kwargs(**given)
            messages = [{"role": role, "content": content} for role, content in thread.get_turns()]
            options: dict[str, Any] = {"return_dict": False, "tools": of_model, **given}
            assert ours.tokenize(thread).token_ids == theirs.apply_chat_template(messages, **options)
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, **options)
            assert ours.prompt_ids(thread) == expected
    assert plain[0] != plain[1] != prompt(ChatTokenizer(files))
    with pytest.raises(UsageError, match="does not read 'enable_thinking'"):
        ChatTokenizer(files, {"enable_thinking": False})
    assert ChatTokenizer(files, {"enable_thinking": False, "tools": TOOLS})


def test_variables_stay_through_tokens_and_back(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    thread = QUESTION.with_template_kwargs(tools=TOOLS)
    made = tokenizer.with_completion(thread, tokenizer.prompt_ids(thread), tokenizer.encode("a<|im_end|>"))
    for copied in (made, tokenizer.detokenize(made), tokenizer.tokenize(tokenizer.detokenize(made))):
        assert copied.template_kwargs == {"tools": TOOLS}
    assert tokenizer.tokenize(tokenizer.detokenize(made)).token_ids[: len(made.token_ids)] == made.token_ids


def test_a_name_that_the_template_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"does not read 'enable_thinkin'; did you mean enable_thinking\?"):
        load(tmp_path, enable_thinkin=False)
    tokenizer = load(tmp_path)
    for _ in range(2):  # a row of data may have it: it is told, once, and the thread works
        assert prompt(tokenizer, QUESTION.with_template_kwargs(enable_thinkin=False)) == prompt(tokenizer)
    assert capsys.readouterr().err.count("does not read 'enable_thinkin'") == 1
    local = load(tmp_path / "local", "{% set x = 1 %}{% for m in messages %}{{ m.content ~ x }}{% endfor %}<|im_end|>")
    prompt(local, QUESTION.with_template_kwargs(x=2, tools=TOOLS))
    told = capsys.readouterr().err
    assert "does not read 'tools'" in told and "does not read 'x'" in told


def test_the_thread_wins_over_the_builder_and_the_builder_over_the_registry(
    one_rank: LiveEngine, tmp_path: Path
) -> None:
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{{ a }}|{{ b }}|{{ c }}|{{ tools | tojson | length }}<|im_end|>"
    )
    one_rank.registry.add("variables", "builtin:tiny-lm", chat_template=tmp_path / "template.jinja")
    stored = one_rank.registry.set_defaults("variables", {"chat_template_kwargs": {"a": 1, "b": 1, "c": 1}})
    assert stored.defaults.effective()["chat_template_kwargs"][0] == {"a": 1, "b": 1, "c": 1}

    async def work() -> None:
        context: Any = type("Context", (), {"client": one_rank.client})
        parameter = Model(model_key="variables")
        builder = await parameter.to_builder(context, chat_template_kwargs={"b": 2, "c": 2})
        assert builder.to_python_dict()["chat_template_kwargs"] == {"a": 1, "b": 2, "c": 2}
        model = await builder.spawn_inference("variables")
        thread = QUESTION.with_template_kwargs(c=3, tools=TOOLS)
        drawn = (await model.max_gen_len(1).generate_tokens(thread)).token_ids
        assert (await model.detokenize(drawn)).startswith("q1|2|3|85")
        assert (await model.detokenize((await model.tokenize_thread(QUESTION)).token_ids)).startswith("q1|2|2|4")
        await model.dealloc()
        refused = await parameter.to_builder(context, chat_template_kwargs={"d": 2})
        with pytest.raises(UsageError, match="does not read 'd'"):
            await refused.spawn_inference("refused")
        with pytest.raises(DataError, match="'a' must be JSON"):
            await parameter.to_builder(context, chat_template_kwargs={"a": {1}})

    one_rank.run(work())


def test_a_trained_model_keeps_what_was_set(one_rank: LiveEngine, tmp_path: Path) -> None:
    (template := tmp_path / "template.jinja").write_text(THINKING)
    one_rank.registry.add("keeps", "builtin:tiny-lm", chat_template=template)
    one_rank.registry.set_defaults("keeps", {"chat_template_kwargs": {"tools": []}})
    with one_rank.registry.stage() as staging:
        for file in one_rank.registry.resolve("keeps").path.glob("*"):
            (staging.directory / file.name).write_bytes(file.read_bytes())
        made = staging.publish("kept", parent=one_rank.registry.resolve("keeps"))
    assert made.defaults.chat_template_kwargs == {"tools": []}
    unset = one_rank.registry.set_defaults("kept", {"chat_template_kwargs": None})
    assert unset.defaults.chat_template_kwargs is None and "chat_template_kwargs" not in unset.defaults.effective()
