"""ChatTokenizer against transformers, and which tokens carry a turn's weight."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tokenizers import AddedToken

import tokenizer_directories as directories
from harmony_core.errors import TokenizationError
from harmony_core.text.chat_template import ChatTemplate, Rendered
from harmony_core.text.row_lengths import growth
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer

FAMILIES = sorted(directories.FAMILIES)
PAIRS = [
    ("user", "What is 12 + 30?"),
    ("assistant", "42"),
    ("user", " naïve café 你好\n🙂 "),
    ("assistant", "  It\n\nis!  "),
]
CONVERSATIONS = [
    [("user", "hi")],
    PAIRS[:2],
    PAIRS,
    [("user", "a"), ("assistant", "")],
    [("user", "words <|im_end|> inside"), ("assistant", "so </s> be <|eot_id|> it <end_of_turn> now")],
    [("system", "You are a helpful assistant."), ("user", "the quick brown fox"), ("assistant", "jumps")],
]
NO_SYSTEM = {"mistral", "mistral-tools", "gemma"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for name in FAMILIES:
        directories.family(root / name, name)
    return root


@pytest.fixture(scope="module")
def tokenizers(root: Path) -> dict[str, ChatTokenizer]:
    return {name: ChatTokenizer.load(root / name) for name in FAMILIES}


def weighted_texts(tokenizer: ChatTokenizer, tokenized: TokenizedThread) -> list[str]:
    """The text of each run of weighted tokens."""
    runs: list[list[int]] = []
    previous = 0.0
    for token, weight in zip(tokenized.token_ids, tokenized.token_weights, strict=True):
        if weight and not previous:
            runs.append([])
        if weight:
            runs[-1].append(token)
        previous = weight
    return [tokenizer.decode(run) for run in runs]


def all_assistant(turns: list[tuple[str, str]]) -> StringThread:
    return StringThread(turns).with_weight_all_assistant_turns()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family: str, root: Path, tokenizers: dict[str, ChatTokenizer]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(root / family)
    for turns in CONVERSATIONS:
        if turns[0][0] == "system" and family in NO_SYSTEM:
            continue
        messages = [{"role": role, "content": content} for role, content in turns]
        thread = StringThread(turns).with_weight_last_assistant_turn()
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert tokenizers[family].tokenize(thread).token_ids == expected
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert tokenizers[family].prompt_ids(thread) == expected
    text = "plain text, <|im_end|> and 🙂"
    ids = theirs.encode(text, add_special_tokens=False)
    assert tokenizers[family].encode(text) == ids and tokenizers[family].decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_model_must_emit_is_weighted(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
    tokenized = tokenizer.tokenize(
        all_assistant([("user", "hi"), ("assistant", "a b"), ("user", "so"), ("assistant", "c")])
    )
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert weighted_texts(tokenizer, tokenized) == [f"a b{end}", f"{thought}c{end}"]
    assert [turn.role for turn in tokenized.get_turns()] == ["user", "assistant", "user", "assistant"]
    assert tokenizer.decode(tokenized.get_turns()[2].content).strip() == "so"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weighted_tokens_continue_the_prompt(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers[family]
    for turns in (PAIRS[:2], PAIRS):
        tokenized = tokenizer.tokenize(all_assistant(turns))
        last = tokenized.token_turns[-1]
        prompt = tokenizer.prompt_ids(StringThread(turns[:-1]))
        assert tokenized.token_ids[: last.start] == prompt
        assert tokenized.token_ids[last.end - 1] in tokenizer.stop_ids
        assert all(weight == 0 for weight in tokenized.token_weights[last.end :])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_never_retokenised(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
    thread = StringThread([("user", "hi")], {"k": 1})
    prompt = tokenizer.prompt_ids(thread)
    odd = [*tokenizer.encode("w"), *tokenizer.encode("ords"), *tokenizer.encode(end)[-1:]]
    made = tokenizer.with_completion(
        thread, prompt, odd, logprobs=[-1.0] * len(odd), sampled_logprobs=[-2.0] * len(odd), versions=[5] * len(odd)
    )
    assert made.token_ids == prompt + odd
    assert made.token_weights == [0.0] * len(prompt) + [1.0] * len(odd)
    assert made.logprobs == [-1.0] * len(odd) and made.versions == [5] * len(odd)
    assert made.last_content() == odd and made.metadata is thread.metadata
    text = tokenizer.detokenize(made)
    assert text.get_turns()[0] == ("user", "hi") and text.get_turn_weights() == [0.0, 1.0]
    assert (text.completion() or "").replace(" ", "") == "words"
    assert tokenizer.decode(made.get_turns()[0].content).strip() == "hi"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3"}))
def test_a_generated_thread_tokenizes_to_the_same_tokens(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
    thread = StringThread([("user", "hi")])
    whole = tokenizer.tokenize(thread.assistant("words of a model"))
    prompt = tokenizer.prompt_ids(thread)
    completion = whole.last_content() or []
    assert tokenizer.decode(completion[-1:]) == end
    made = tokenizer.with_completion(thread, prompt, completion)
    assert tokenizer.tokenize(tokenizer.detokenize(made)).token_ids == whole.token_ids


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages each rendering had."""
    rendered: list[int] = []
    render = ChatTemplate.render

    def counted(
        template: ChatTemplate, messages: list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> Rendered:
        rendered.append(len(messages))
        return render(template, messages, add_generation_prompt)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    return rendered


@pytest.mark.parametrize(
    ("family", "weighted", "renderings"),
    [
        ("chatml", [4], [10, 10, 9]),  # plain and marked, and the prompt of the weighted turn
        ("chatml", [1, 3], [10, 10, 3, 7, 9]),  # and of the last, whatever its weight
        ("qwen3", [4], [10, 10, 9]),
        ("qwen3", [1, 3, 4], [10, 10, 3, 7, 9, 8, 8, 4, 4]),  # each further part twice, no prompt again
    ],
)
def test_how_often_a_thread_is_rendered(
    family: str, weighted: list[int], renderings: list[int], tokenizers: dict[str, ChatTokenizer], rendered: list[int]
) -> None:
    tokenizer, thread = tokenizers[family], StringThread()
    thought = "<think>\nhm\n</think>\n\n" if family == "qwen3" else ""
    for turn in range(5):
        thread = thread.user("q").assistant(f"{thought}{turn}")
    turns = [replace(turn, weight=float(i % 2 and i // 2 in weighted)) for i, turn in enumerate(thread.turns)]
    thread = StringThread.from_turns(turns)
    rendered.clear()
    parts = tokenizer.parts(thread)
    assert rendered == renderings
    texts = [text for part in parts for text in weighted_texts(tokenizer, part)]
    assert sorted(texts) == [f"{thought}{turn}<|im_end|>" for turn in weighted]
    if family == "chatml":
        whole = tokenizer.tokenize(thread)
        assert (whole.token_ids, whole.token_weights) == (parts[0].token_ids, parts[0].token_weights)
        assert whole.with_weight_all_assistant_turns().get_turn_weights() == [0.0, 1.0] * 5
        with pytest.raises(TokenizationError, match="no weight when the thread was tokenized in parts"):
            parts[0].with_weight_all_assistant_turns()


def weighted_threads(answers: int, thought: str = "") -> Iterator[tuple[StringThread, list[int]]]:
    """A thread of as many questions and answers, with each choice of one or more weighted answers."""
    thread = StringThread()
    for number in range(answers):
        thread = thread.user("q").assistant(f"{thought}{number}")
    for count in range(1, answers + 1):
        for weighted in combinations(range(1, 2 * answers, 2), count):
            turns = [replace(turn, weight=float(i in weighted)) for i, turn in enumerate(thread.turns)]
            yield StringThread.from_turns(turns), list(weighted)


@pytest.mark.parametrize("source", [directories.CHATML, directories.MARKED.replace("<think>\n", "")])
@pytest.mark.parametrize("answers", [1, 2, 4])
def test_a_thread_is_rendered_twice_and_once_for_each_weighted_turn(
    source: str, answers: int, tmp_path: Path, rendered: list[int]
) -> None:
    """With or without generation tags. The last turn counts as a weighted one."""
    tokenizer = load(tmp_path, source)
    for thread, weighted in weighted_threads(answers):
        prompts = sorted({*weighted, 2 * answers - 1})
        for tokenize in (tokenizer.tokenize, tokenizer.parts):
            rendered.clear()
            tokenize(thread)
            assert sorted(rendered) == [*prompts, 2 * answers, 2 * answers]
        whole = tokenizer.tokenize(thread)
        rendered.clear()
        texts = [tokenizer.decode(turn.content) for turn in whole.get_turns()[1::2]]
        assert texts == [f"{number}<|im_end|>" for number in range(answers)]
        # The places of turns without a weight take the prompts of all turns, once.
        whole.with_weight_all_assistant_turns()
        assert len(rendered) == (2 + answers if len(prompts) < answers else 0)


@pytest.mark.parametrize("answers", [2, 4])
def test_each_part_of_a_split_thread_is_rendered_twice_and_no_prompt_again(
    answers: int, tokenizers: dict[str, ChatTokenizer], rendered: list[int]
) -> None:
    """Qwen3's template leaves out the thoughts of earlier answers; a thread that is refused is not rendered again."""
    tokenizer = tokenizers["qwen3"]
    for thread, weighted in weighted_threads(answers, "<think>\nhm\n</think>\n\n"):
        ends = [2 * answers, *(turn + 1 for turn in weighted if turn + 1 < 2 * answers)]
        prompts = {*weighted, 2 * answers - 1}
        rendered.clear()
        assert len(tokenizer.parts(thread)) == len(weighted)
        assert sorted(rendered) == sorted([*prompts, *ends, *ends])
        rendered.clear()
        if len(ends) > 1:
            with pytest.raises(TokenizationError, match="leaves out its thought"):
                tokenizer.tokenize(thread)
            assert sorted(rendered) == sorted([*prompts, *ends, *ends])


@pytest.mark.parametrize(("head", "renderings"), [("", 3), ("{# strftime_now #}", 9)])
def test_a_prompt_is_rendered_once_for_all_its_completions(
    tmp_path: Path, rendered: list[int], head: str, renderings: int
) -> None:
    """Once for its tokens and twice for the places of its turns; a template that may tell the time each time."""
    tokenizer = load(tmp_path, head + directories.CHATML)
    rendered.clear()
    made = []
    for place in range(3):
        thread = StringThread([("user", "hi")], {"place": place})
        prompt = tokenizer.prompt_ids(thread)
        made.append(tokenizer.with_completion(thread, prompt, tokenizer.encode("words")))
        prompt.clear()
    assert len(rendered) == renderings
    assert [thread.metadata["place"] for thread in made] == [0, 1, 2]
    assert made[0].token_ids == made[2].token_ids and made[0].token_ids is not made[2].token_ids


def test_an_unfinished_completion_keeps_its_last_token(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    thread = StringThread([("user", "hi")])
    made = tokenizer.with_completion(thread, tokenizer.prompt_ids(thread), tokenizer.encode("cut of"), finished=False)
    assert tokenizer.detokenize(made).completion() == "cut of"
    assert made.generation is not None and made.generation.finish_reason == "length"
    empty = tokenizer.with_completion(thread, tokenizer.prompt_ids(thread), [])
    assert tokenizer.detokenize(empty).completion() == ""


def test_a_completion_of_another_prompt_keeps_its_tokens(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    made = tokenizer.with_completion(StringThread([("user", "hi")]), [1, 2, 3], [4, 5])
    assert made.token_ids == [1, 2, 3, 4, 5] and made.token_weights == [0, 0, 0, 1, 1]
    assert made.get_turns()[0] == ("user", [])


@pytest.mark.parametrize("family", FAMILIES)
def test_detokenize_gives_back_turns_weights_and_metadata(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    thread = StringThread(PAIRS, {"k": [1]}).with_weight_assistant_turns_from_index(1)
    again = tokenizers[family].detokenize(tokenizers[family].tokenize(thread))
    assert again.get_turns() == thread.get_turns()
    assert again.get_turn_weights() == thread.get_turn_weights() and again.metadata is thread.metadata


def test_turn_weights_multiply(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    stored = StringThread([("user", "q"), ("assistant", "abc")]).to_json().replace('"mult": 1.0', '"mult": 0.5')
    tokenized = tokenizer.tokenize(StringThread.from_json(stored))
    assert {*tokenized.token_weights} == {0.0, 0.5}
    assert weighted_texts(tokenizer, tokenized) == ["abc<|im_end|>"]


def test_weighted_turns_of_other_roles_are_their_content(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    thread = StringThread().system("be brief").user("  hi ").assistant("yo")
    assert weighted_texts(tokenizer, tokenizer.tokenize(thread)) == ["be brief", "yo<|im_end|>"]
    assert weighted_texts(tokenizer, tokenizer.tokenize(StringThread([("user", "  hi \n")]))) == ["hi"]


def test_a_stop_token_inside_the_content_does_not_end_the_turn(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    thread = StringThread([("user", "q"), ("assistant", "a<|im_end|>b")])
    assert weighted_texts(tokenizer, tokenizer.tokenize(thread)) == ["a<|im_end|>b<|im_end|>"]


def test_the_same_words_in_every_turn_are_not_mixed_up(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    turns = [("system", "a"), ("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a")]
    tokenized = tokenizer.tokenize(StringThread(turns))
    assert tokenized.token_weights[-3:] == [1.0, 1.0, 0.0] and sum(tokenized.token_weights) == 2


def test_private_use_characters_in_the_text_do_no_harm(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    thread = StringThread([("user", "\U000f0000q\U000f0001"), ("assistant", "\U000f0002a\ue000")])
    assert weighted_texts(tokenizer, tokenizer.tokenize(thread)) == ["\U000f0002a\ue000<|im_end|>"]


def test_a_thread_whose_thoughts_do_not_last_is_split(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["qwen3"]
    thought = "<think>\nhm\n</think>\n\n"
    turns = [("user", "q"), ("assistant", f"{thought}one"), ("user", "r"), ("assistant", f"{thought}two")]
    last, first = tokenizer.parts(all_assistant(turns))
    assert weighted_texts(tokenizer, last) == [f"{thought}two<|im_end|>"]
    assert weighted_texts(tokenizer, first) == [f"{thought}one<|im_end|>"]
    assert len(last.token_turns) == 4 and len(first.token_turns) == 2
    for part in (first, last):
        turn = part.token_turns[-1]
        before = StringThread(turns[: len(part.token_turns) - 1])
        assert part.token_ids[: turn.start] == tokenizer.prompt_ids(before)
    assert growth([last, first]) == 1 + len(first.token_ids) / len(last.token_ids)
    with pytest.raises(TokenizationError, match=r"turn 1 .* leaves out its thought 'hm'") as refusal:
        tokenizer.tokenize(all_assistant(turns))
    assert "train_language_modelling and logprobs split" in refusal.value.hint
    assert [part.token_ids for part in tokenizer.parts(StringThread(turns))] == [last.token_ids]


def test_reasoning_calls_and_tool_responses_reach_the_template(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["qwen3"]
    call = {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"x": 1}'}
    turns = [
        ("user", "add <tool_response>"),
        ("assistant", [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "so"}, call]),
        ("tool", [{"type": "tool_response", "call_id": "1", "content": "2"}]),
        ("assistant", "done"),
    ]
    thread = asyncio.run(StringThread.from_dataset(turns, None)).with_weight_all_assistant_turns()
    tokenized = tokenizer.tokenize(thread)
    assert weighted_texts(tokenizer, tokenized) == [
        '<think>\nhm\n</think>\n\nso\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\ndone<|im_end|>",
    ]
    assert "<tool_response>\n2\n</tool_response>" in tokenizer.decode(tokenized.token_ids)


def test_a_template_that_looks_into_contents_still_gives_assistant_turns(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["qwen3"]
    turns = [("user", "q"), ("assistant", "a"), ("user", "<tool_response>2</tool_response>"), ("assistant", "done")]
    tokenized = tokenizer.tokenize(StringThread(turns))
    assert weighted_texts(tokenizer, tokenized) == ["<think>\n\n</think>\n\ndone<|im_end|>"]


def load(directory: Path, template: str | None, **more: Any) -> ChatTokenizer:
    specials = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return ChatTokenizer.load(directories.write(directory, template, specials, **more))


def test_generation_blocks_do_not_replace_the_prompt(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    block, header = "{% generation %}", "<|im_start|>assistant\n"
    closed = directories.MARKED.replace("<think>\n", "")
    sloppy = closed.replace(header + block, block + header)
    narrow = closed.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}<|im_end|>")
    assert len({closed, sloppy, narrow}) == 3
    for name, template in (("exact", closed), ("header inside", sloppy), ("end outside", narrow)):
        tokenizer = load(tmp_path / name, template)
        assert weighted_texts(tokenizer, tokenizer.tokenize(all_assistant(turns))) == ["a<|im_end|>", "b<|im_end|>"]
    tokenizer = load(tmp_path / "opens a thought", directories.MARKED)
    with pytest.raises(TokenizationError, match=r"turn 3 .* goes on with '<think>\\n' where .* has 'b") as refusal:
        tokenizer.tokenize(all_assistant(turns))
    # The way out that the error names works.
    assert "begin its text with an empty thought" in refusal.value.hint and "enable" not in refusal.value.hint
    tokenized = tokenizer.tokenize(StringThread([("user", "q"), ("assistant", "<think>\n\n</think>\n\nb")]))
    assert weighted_texts(tokenizer, tokenized) == ["\n</think>\n\nb<|im_end|>"]


def test_a_turn_without_its_prompt_cannot_be_trained(tmp_path: Path) -> None:
    plain = directories.MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = load(tmp_path, plain)
    thread = StringThread([("user", "q"), ("assistant", "a")])
    with pytest.raises(TokenizationError, match=r"turn 1 \(assistant\) cannot be trained: .* begins with"):
        tokenizer.tokenize(thread)
    unweighted = StringThread([("user", "q"), ("assistant", "a"), ("user", "r")])
    assert tokenizer.tokenize(unweighted).get_turns()[1].content == []


def test_a_template_without_end_tokens_cannot_be_trained(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path / "none",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    with pytest.raises(TokenizationError, match="writes no end-of-turn token after it"):
        tokenizer.tokenize(StringThread([("user", "q"), ("assistant", "a")]))
    late = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    tokenizer = load(tmp_path / "late", late.replace("[", "").replace("]", ""))
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert weighted_texts(tokenizer, tokenizer.tokenize(StringThread(turns))) == ["b<|im_end|>"]
    with pytest.raises(TokenizationError, match=r"turn 1 .* no end-of-turn token"):
        tokenizer.tokenize(all_assistant(turns))


def test_an_answer_is_tokenized_behind_the_tokens_of_its_prompt(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, directories.CHATML)
    prompt = tokenizer.prompt_ids(StringThread([("user", "q")]))
    assert tokenizer.encode("<|im_start|>assistant\n\n\na")[: len(prompt)] != prompt  # they would share a token
    turns = [("user", "q"), ("assistant", "\n\na")]
    tokenized = tokenizer.tokenize(StringThread(turns))
    assert tokenized.token_ids[: len(prompt)] == prompt and tokenized.token_turns[1].start == len(prompt)
    assert weighted_texts(tokenizer, tokenized) == ["\n\na<|im_end|>"]
    # A turn that follows sees the shared token in its own prompt: both cannot be in one row.
    longer = all_assistant([*turns, ("user", "r"), ("assistant", "b")])
    assert [weighted_texts(tokenizer, part) for part in tokenizer.parts(longer)] == [
        ["b<|im_end|>"], ["\n\na<|im_end|>"],
    ]  # fmt: skip


def test_an_answer_that_cannot_be_tokenized_behind_its_prompt_is_refused(tmp_path: Path) -> None:
    inner = directories.metaspace()
    inner.add_tokens([AddedToken("]a", normalized=False)])
    template = (
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    )
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = ChatTokenizer.load(directories.write(tmp_path, template, specials, inner))
    assert weighted_texts(tokenizer, tokenizer.tokenize(StringThread([("user", "q"), ("assistant", "b")]))) == ["b</s>"]
    with pytest.raises(TokenizationError, match="its first characters share a token with the end of the prompt"):
        tokenizer.tokenize(StringThread([("user", "q"), ("assistant", "a")]))


def test_a_completion_keeps_the_blank_that_its_decoder_takes(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(directories.family(tmp_path, "mistral"))
    thread = StringThread([("user", "x")])
    prompt = tokenizer.prompt_ids(thread)
    whole = tokenizer.encode("[INST] x [/INST]    return x")
    assert whole[: len(prompt) - 1] == prompt[1:]
    completion = [*whole[len(prompt) - 1 :], *tokenizer.encode("</s>")[-1:]]
    assert tokenizer.detokenize(tokenizer.with_completion(thread, prompt, completion)).completion() == "    return x"
    assert tokenizer.decode(completion[:-1]) == "   return x"


def test_a_turn_that_the_template_leaves_out_is_an_error(tokenizers: dict[str, ChatTokenizer]) -> None:
    thread = StringThread([("user", "q"), ("critic", "bad"), ("assistant", "a")])
    for ask in (tokenizers["qwen3"].tokenize, tokenizers["qwen3"].prompt_ids):
        with pytest.raises(TokenizationError, match=r"leaves out the text of turn 1 \(critic\)"):
            ask(thread)


def test_what_the_template_refuses(tokenizers: dict[str, ChatTokenizer]) -> None:
    with pytest.raises(TokenizationError, match=r"gemma/tokenizer_config.json.*System role not supported"):
        tokenizers["gemma"].tokenize(StringThread([("system", "s"), ("user", "q")]))
    with pytest.raises(TokenizationError, match="alternate"):
        tokenizers["mistral"].prompt_ids(StringThread([("user", "q"), ("user", "r")]))


def test_a_system_message_that_only_the_prompt_has(root: Path, tokenizers: dict[str, ChatTokenizer]) -> None:
    from transformers import AutoTokenizer

    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    theirs = AutoTokenizer.from_pretrained(root / "mistral-tools")
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert tokenizers["mistral-tools"].prompt_ids(StringThread(turns)) == expected
    # With an answer behind it the template drops it: what would be trained is not what was sampled.
    with pytest.raises(TokenizationError, match=r"leaves out the text of turn 0 \(system\)"):
        tokenizers["mistral-tools"].tokenize(StringThread([*turns, ("assistant", "d")]))


def test_threads_that_are_not_text(tokenizers: dict[str, ChatTokenizer]) -> None:
    image = {"type": "image", "url": "data:image/gif;base64,R0lGODdhAQ=="}
    thread = asyncio.run(StringThread.from_fragments([("system", [image])]))
    for ask in (tokenizers["chatml"].tokenize, tokenizers["chatml"].prompt_ids):
        with pytest.raises(TokenizationError, match=r"turn 0 \(system\) holds an image"):
            ask(thread)
        with pytest.raises(TokenizationError, match="without turns"):
            ask(StringThread())
        with pytest.raises(TokenizationError, match="not valid Unicode"):
            ask(StringThread([("user", "a\ud800")]))


def test_an_assistant_turn_may_come_first(tokenizers: dict[str, ChatTokenizer]) -> None:
    for family in ("chatml", "llama3", "qwen2"):
        tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
        tokenized = tokenizer.tokenize(StringThread([("assistant", "a")]))
        assert weighted_texts(tokenizer, tokenized) == [f"a{end}"]


def test_stop_ids_come_from_every_file_and_from_the_template(tmp_path: Path) -> None:
    files = {"generation_config.json": {"eos_token_id": [7, 9]}, "config.json": {"eos_token_id": 8}}
    specials = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    tokenizer = ChatTokenizer.load(directories.write(tmp_path, directories.CHATML, specials, files=files))
    assert tokenizer.stop_ids == {7, 8, 9, *tokenizer.encode("</s>"), *tokenizer.encode("<|im_end|>")}


def test_a_structured_turn_may_stand_in_a_prompt(tokenizers: dict[str, ChatTokenizer]) -> None:
    class Answer(BaseModel):
        values: dict[str, int]

    thread = StringThread([("user", "q")]).structured(Answer(values={"a": 1})).user("again")
    text = tokenizers["chatml"].decode(tokenizers["chatml"].prompt_ids(thread))
    assert '{"values":{"a":1}}' in text


def test_where_a_template_may_be(tmp_path: Path) -> None:
    hello = "{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    thread = StringThread([("user", "q")])
    named = load(
        tmp_path / "named",
        None,
        chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": hello}],
    )
    assert named.decode(named.prompt_ids(thread)) == "q</s>"
    directory = directories.write(tmp_path / "file", "other", {})
    (directory / "chat_template.jinja").write_text(hello)
    assert ChatTokenizer.load(directory).prompt_ids(thread) == named.prompt_ids(thread)
    none = load(tmp_path / "none", None)
    assert none.encode("q") == named.encode("q")
    with pytest.raises(TokenizationError, match="none has no chat template"):
        none.tokenize(thread)
    with pytest.raises(TokenizationError, match="no entry named 'default'"):
        load(tmp_path / "nameless", None, chat_template=[{"name": "rag", "template": "x"}])


def test_tokens_that_only_the_configuration_declares(tmp_path: Path) -> None:
    plain = load(tmp_path / "a", directories.CHATML)
    new = plain._tokenizer.get_vocab_size()
    declared = {str(new): {"content": "<|new|>", "special": True}, "401": {"content": "<|im_end|>"}}
    tokenizer = load(tmp_path / "b", directories.CHATML, added_tokens_decoder=declared)
    assert tokenizer.encode("a<|new|>")[-1] == new
    with pytest.raises(TokenizationError, match="does not get its declared id 9999"):
        load(tmp_path / "c", directories.CHATML, added_tokens_decoder={"9999": {"content": "<|new|>"}})


def test_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    inner = directories.byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    tokenizer = load(tmp_path, directories.CHATML, tokenizer=inner)
    assert len(tokenizer.encode("1 2 3 4 5 6 7 8")) > 4 and len(tokenizer.encode("1")) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Evil"}}', "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a string"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("generation_config.json", '{"eos_token_id": "2"}', "generation_config.json: eos_token_id must be"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja: chat template: line 1"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    directories.write(tmp_path, directories.CHATML, {})
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizationError, match=words):
        ChatTokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(TokenizationError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
