"""The contract of templates: nothing of a weighted turn is lost, and its prompt's tokens are what stands before it."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import tokenizer_directories as directories
from harmony_core.errors import TokenizationError
from harmony_core.text.marking import all_messages
from harmony_core.text.threads import StringThread
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.turns import AnyFragment, FunctionCall, Reasoning, Text, ToolResponse, Turn

CALLS = (
    "{%- for c in m.tool_calls or [] -%}{{- '\n[call] ' + c.function.name + ' ' + (c.function.arguments | tojson) -}}"
    "{%- endfor -%}"
)
BRANCHES = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role -}}"
    "{%- if m.reasoning_content -%}{{- '\n<think>' + m.reasoning_content + '</think>' -}}{%- endif -%}"
    "{%- if m.content -%}{{- '\n' + m.content -}}{%- endif -%}" + CALLS + "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"
)
"""Writes nothing but the header for a content that is empty: a mark in it would change the result."""
R1 = (
    "{%- for m in messages -%}{%- set c = m.content -%}"
    "{%- if m.role == 'assistant' and '</think>' in c -%}{%- set c = c.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
"""Takes thoughts out of every answer, behind a prompt that opens one."""

CALL = FunctionCall("c1", "rain", '{"city": "oslo", "days": 3}')
RESPONSE = Turn("tool", (ToolResponse("c1", "yes"),), 0.0)


def load(directory: Path, template: str) -> ChatTokenizer:
    return ChatTokenizer.load(directories.write(directory, template, {"bos_token": "<s>", "eos_token": "<|im_end|>"}))


def answered(*parts: AnyFragment) -> StringThread:
    return StringThread.from_turns([Turn("user", (Text("rain in oslo"),), 0.0), Turn("assistant", parts, 1.0)])


def trained(tokenizer: ChatTokenizer, thread: StringThread) -> str:
    tokenized = tokenizer.tokenize(thread)
    turn = tokenized.token_turns[-1]
    return tokenizer.decode(tokenized.token_ids[turn.start : turn.end])


@pytest.mark.parametrize(
    ("parts", "lost"),
    [
        ((CALL,), "its call of 'rain'"),
        ((Text("Let me look."), CALL), "its call of 'rain'"),
        ((Reasoning("look it up"), Text("Rain.")), "its thought 'look it up'"),
        ((Reasoning("look it up"),), "its thought 'look it up'"),
    ],
)
def test_what_a_template_does_not_show_is_named(tmp_path: Path, parts: tuple[AnyFragment, ...], lost: str) -> None:
    tokenizer = load(tmp_path, directories.CHATML)
    with pytest.raises(TokenizationError) as refusal:
        tokenizer.tokenize(answered(*parts))
    assert refusal.value.message == f"turn 1 (assistant) cannot be trained: the chat template leaves out {lost}"
    with pytest.raises(TokenizationError, match="leaves out"):
        tokenizer.parts(answered(*parts))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("m.content", "m.content | replace('wet', 'dry')"), "rewrites its text 'Rather wet,\\nwetter.'"),
        (("m.content", "m.content | replace('\n', ' ')"), "rewrites its text"),
        (("m.content", "m.content[:6]"), "what it keeps cannot be told"),
        (("m.content -}}", "m.content[2:] -}}"), "what it keeps cannot be told"),
        (("tojson", "tojson | upper"), "rewrites 'city' of its call of 'rain'"),
        (("c.function.arguments", "c.function.arguments.city"), "what it keeps cannot be told"),
        (("(c.function.arguments | tojson)", "(c.function.arguments.keys() | list | tojson)"), "call of 'rain'"),
        (("'\n' + m.content", "'\n<|im_end|>' + m.content"), "writes an end-of-turn token before its end"),
        (("'<|im_end|>\n'", "'\n'"), "writes no end-of-turn token"),
    ],
)
def test_what_a_template_rewrites_is_refused(tmp_path: Path, edit: tuple[str, str], words: str) -> None:
    thread = answered(Text("Rather wet,\nwetter."), CALL)
    whole = load(tmp_path / "whole", BRANCHES)
    assert trained(whole, thread) == '\nRather wet,\nwetter.\n[call] rain {"city": "oslo", "days": 3}<|im_end|>'
    edited = BRANCHES.replace(*edit)
    assert edited != BRANCHES
    with pytest.raises(TokenizationError) as refusal:
        load(tmp_path / "edited", edited).tokenize(thread)
    assert words in refusal.value.message


def test_a_call_without_text_and_what_follows_it_train(tmp_path: Path) -> None:
    call = '\n[call] rain {"city": "oslo", "days": 3}<|im_end|>'
    tokenizer = load(tmp_path, BRANCHES)
    assert trained(tokenizer, answered(CALL)) == call
    thread = StringThread.from_turns([*answered(CALL).turns, RESPONSE]).assistant("it rains")
    assert trained(tokenizer, thread) == "\nit rains<|im_end|>"
    tokenized = tokenizer.tokenize(thread.with_weight_all_assistant_turns())
    assert (
        "".join(tokenizer.decode(turn.content) for turn in tokenized.get_turns()[1::2]) == call + "\nit rains<|im_end|>"
    )


def test_both_names_of_a_thought_reach_the_template(tmp_path: Path) -> None:
    for name in ("reasoning_content", "thinking"):
        tokenizer = load(tmp_path / name, BRANCHES.replace("reasoning_content", name))
        thread = answered(Reasoning("add "), Reasoning("them"), Text("four"))
        assert all_messages(thread.turns)[1][name] == "add them"
        assert trained(tokenizer, thread) == "\n<think>add them</think>\nfour<|im_end|>"


def test_parts_in_an_order_that_no_message_has_are_refused(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, BRANCHES)
    thought, text = Reasoning("hm"), Text("four")
    several: list[AnyFragment] = [thought, text, CALL]
    for parts in itertools.permutations(several):
        if parts == (thought, text, CALL):
            tokenizer.tokenize(answered(*parts))
            continue
        with pytest.raises(TokenizationError, match="in the order of a message: reasoning, text, calls"):
            tokenizer.tokenize(answered(*parts))
    tokenizer.tokenize(answered(Text(""), thought, text))


def test_a_prompt_that_opens_a_thought(tmp_path: Path) -> None:
    tokenizer = load(tmp_path / "cut", R1)
    with pytest.raises(TokenizationError, match="leaves out its thought '17\\*3 = 51'"):
        tokenizer.tokenize(answered(Text("<think>\n17*3 = 51\n</think>\n\n51")))
    with pytest.raises(TokenizationError, match=r"goes on with '<think>\\n' where the conversation has '51") as refusal:
        tokenizer.tokenize(answered(Text("51")))
    assert refusal.value.hint == "take another chat template (models add --chat-template)"  # nothing else would help
    kept = load(tmp_path / "kept", R1.replace("c.split('</think>')[-1]", "c"))
    assert trained(kept, answered(Text("<think>\n17*3 = 51\n</think>\n\n51"))) == "17*3 = 51\n</think>\n\n51<|im_end|>"
    switch = R1.replace("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n").replace(
        "{{- '<|im_start|>assistant\n' -}}",
        "{{- '<|im_start|>assistant\n' -}}{%- if enable_thinking is not false -%}{{- '<think>\n' -}}{%- endif -%}",
    )
    switched = load(tmp_path / "switch", switch)
    with pytest.raises(TokenizationError) as refusal:
        switched.tokenize(answered(Text("51")))
    assert refusal.value.hint.startswith('chat_template_kwargs={"enable_thinking": False}, or')
    assert trained(switched, answered(Text("51")).with_template_kwargs(enable_thinking=False)) == "51<|im_end|>"


def test_a_rewritten_prefix_is_never_trained(tmp_path: Path) -> None:
    """Earlier answers get another header once others follow: what the model was prompted with is gone."""
    template = directories.CHATML.replace(
        "<|im_start|>{{ message['role'] }}",
        "<|im_start|>{{ 'past' if message['role'] == 'assistant' and not loop.last else message['role'] }}",
    )
    tokenizer = load(tmp_path, template)
    thread = StringThread([("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")])
    tokenizer.tokenize(thread)
    everything = thread.with_weight_all_assistant_turns()
    with pytest.raises(TokenizationError, match=r"turn 1 .* goes on with 'assistant\\n' where .* has 'past"):
        tokenizer.tokenize(everything)
    parts = tokenizer.parts(everything)
    assert [len(part.token_turns) for part in parts] == [4, 2]
    for part in parts:
        turn = part.token_turns[-1]
        before = StringThread.from_turns(everything.turns[: len(part.token_turns) - 1])
        assert part.token_ids[: turn.start] == tokenizer.prompt_ids(before)
        assert sum(part.token_weights) == turn.end - turn.start
    with pytest.raises(TokenizationError, match="turn 1"):
        tokenizer.tokenize(thread).with_weight_all_assistant_turns()


TEMPLATES = {name: source for name, (source, *_) in directories.FAMILIES.items()} | {"branches": BRANCHES, "r1": R1}
EDITS = (
    "",
    "| trim ",
    "| upper ",
    "[1:] ",
    "[:-1] ",
    "| replace('a', '') ",
    "| replace(' ', '') ",
    "| length | string ",
)
WORDS = (
    "alpha",
    " beta gamma",
    "\n\ndelta",
    "<b>eta</b> ",
    "<think>\nzeta\n</think>\n\n",
    "1 < 2 & ",
    "  ",
    "théta\n",
)


def random_template(rng: random.Random) -> str:
    """A family's template with up to two places cut out or edited."""
    source = TEMPLATES[rng.choice(sorted(TEMPLATES))]
    for _ in range(rng.randrange(3)):
        for key in rng.sample(["content", "reasoning_content", "arguments", "add_generation_prompt", "name"], 5):
            places = [at for at in range(len(source)) if source.startswith(key, at)]
            if places and key != "add_generation_prompt":
                at = rng.choice(places) + len(key)
                at += 2 if source.startswith("']", at) else 1 if source.startswith('"]', at) else 0
                source = source[:at] + " " + rng.choice(EDITS) + source[at:]
                break
    return source


def random_turn(rng: random.Random, role: str) -> Turn:
    text = "".join(rng.choices(WORDS, k=rng.randrange(1, 4)))
    if role != "assistant":
        return Turn(role, (Text(text or "x"),), 0.0)
    parts: list[AnyFragment] = []
    if rng.random() < 0.4:
        parts.append(Reasoning("".join(rng.choices(WORDS[:4], k=2))))
    if rng.random() < 0.8:
        parts.append(Text(text))
    if rng.random() < 0.4:
        arguments = {rng.choice("xyz"): rng.choice(["oslo", 3, True, None, ["a", 2.5], {"k": "v\n"}])}
        parts.append(FunctionCall("c00000001", rng.choice(["rain", "snow"]), json.dumps(arguments)))
    if rng.random() < 0.15:
        rng.shuffle(parts)
    return Turn("assistant", tuple(parts), float(rng.random() < 0.8))


def flat(text: str) -> str:
    """Without blanks and quotes, escapes undone: what of a string has to be found somewhere."""
    return "".join(text.replace("\\n", "\n").replace("\\u00e9", "é").split())


def strings(turn: Turn) -> list[str]:
    """The strings of an assistant's turn."""
    found = ["".join(part.text for part in turn.fragments if isinstance(part, Reasoning)), turn.text]
    for part in turn.fragments:
        if isinstance(part, FunctionCall):
            found += [part.name, *json.loads(part.arguments), *map(_leaf, json.loads(part.arguments).values())]
    return found


def _leaf(value: object) -> str:
    while isinstance(value, list | dict):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return "null" if value is None else str(value)


def check(tokenizer: ChatTokenizer, turns: Sequence[Turn]) -> bool:
    """Whether the thread is trained; then each weighted turn is, once, whole, behind its prompt's own tokens."""
    thread = StringThread.from_turns(turns)
    try:
        parts = tokenizer.parts(thread)
    except TokenizationError:
        return False
    weighted = [at for part in parts for at, turn in enumerate(part.token_turns) if turn.weight]
    assert sorted(weighted) == [at for at, turn in enumerate(turns) if turn.weight]
    for part in parts:
        for at, turn in enumerate(part.token_turns):
            if not turn.weight:
                continue
            prompt = tokenizer.prompt_ids(StringThread.from_turns(turns[:at]))
            assert part.token_ids[: turn.start] == prompt
            text = tokenizer.decode(part.token_ids[turn.start : turn.end])
            assert part.token_ids[turn.end - 1] in tokenizer.stop_ids
            opened = "<think>" if tokenizer.decode(prompt).rstrip().endswith("<think>") else ""
            for string in strings(turns[at]):
                forms = (string, string.lower(), "None") if string in ("null", "True") else (string,)
                assert any(flat(form) in flat(opened + text) for form in forms), (string, text)
    return True


def test_random_templates_and_fragments_train_whole_or_not_at_all(tmp_path: Path) -> None:
    rng, outcomes = random.Random(11), {True: 0, False: 0}
    tokenizer = directories.byte_level()
    for number in range(150):
        directory = directories.write(
            tmp_path / str(number), random_template(rng), {"bos_token": "<s>", "eos_token": "<|im_end|>"}, tokenizer
        )
        try:
            ours = ChatTokenizer.load(directory)
        except TokenizationError:
            continue
        for _ in range(4):
            roles = ["user", "assistant"] * rng.randrange(1, 4)
            outcomes[check(ours, [random_turn(rng, role) for role in roles])] += 1
    assert min(outcomes.values()) > 100, outcomes
