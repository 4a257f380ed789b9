"""Turns that were drawn stay as they were drawn: in the next prompt, in training, and where an answer goes on."""

from __future__ import annotations

import random

import pytest

import tokenizer_directories as directories
from harmony_core.errors import TokenizationError
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer

QUESTION = StringThread([("user", "What is 12 + 30?")], {"k": 1})


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    root = tmp_path_factory.mktemp("drawn")
    return {name: ChatTokenizer.load(directories.family(root / name, name)) for name in directories.FAMILIES}


def odd(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Tokens of a text that the tokenizer itself would not choose: one for each of its letters."""
    letters = [tokenizer.encode(letter) for letter in text]
    return [token for ids in letters for token in ids[-1:]]


def draw(
    tokenizer: ChatTokenizer, thread: StringThread | TokenizedThread, ids: list[int], **more: bool
) -> TokenizedThread:
    prompt = tokenizer.unfinished_ids(thread) if more.get("continued") else tokenizer.prompt_ids(thread)
    numbers = [-float(i + 1) for i in range(len(ids))]
    return tokenizer.with_completion(
        thread, prompt, ids, logprobs=numbers, sampled_logprobs=numbers, versions=[0] * len(ids), model="m", **more
    )


@pytest.mark.parametrize("family", sorted(directories.FAMILIES))
@pytest.mark.parametrize("finished", [True, False])
def test_the_next_prompt_begins_with_what_was_drawn(
    family: str, finished: bool, tokenizers: dict[str, ChatTokenizer]
) -> None:
    tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
    stop = tokenizer.encode(end)[-1:]
    first = draw(tokenizer, QUESTION, [*odd(tokenizer, "words again"), *(stop if finished else [])], finished=finished)
    expected = tokenizer.decode(
        tokenizer.prompt_ids(StringThread([*tokenizer.detokenize(first).get_turns(), ("user", "q")]))
    )
    for again in (
        first.user("q"),
        tokenizer.detokenize(first).user("q"),
        tokenizer.tokenize(tokenizer.detokenize(first)).user("q"),
    ):
        prompt = tokenizer.prompt_ids(again)
        assert prompt[: len(first.token_ids)] == first.token_ids
        assert tokenizer.decode(prompt).replace(" ", "") == expected.replace(" ", "")
        second = draw(tokenizer, again, [*odd(tokenizer, "it is"), *stop])
        assert second.token_ids[: len(prompt)] == prompt and second.metadata == {"k": 1}
        contents = [turn.content for turn in second.get_turns()]
        assert contents[1] == first.last_content() and contents[3] == [*odd(tokenizer, "it is"), *stop]
        assert tokenizer.decode(contents[2]).strip() == "q"
        third = tokenizer.prompt_ids(second.user("r"))
        assert third[: len(second.token_ids)] == second.token_ids
        assert tokenizer.prompt_ids(tokenizer.detokenize(second).user("r")) == third


def test_training_takes_the_tokens_that_were_drawn(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    stop = tokenizer.encode("<|im_end|>")
    drawn = [*odd(tokenizer, "again"), *stop]
    text = tokenizer.detokenize(draw(tokenizer, QUESTION, drawn)).user("q").assistant("\n\nanswer")
    both = tokenizer.tokenize(text.with_weight_all_assistant_turns())
    weighted = [token for token, weight in zip(both.token_ids, both.token_weights, strict=True) if weight]
    assert weighted == [*drawn, *tokenizer.encode("\n\nanswer"), *stop]
    alone = tokenizer.tokenize(tokenizer.detokenize(draw(tokenizer, QUESTION, drawn)))
    assert alone.logprobs == [-float(i + 1) for i in range(len(drawn))] and alone.generation is not None
    # An own text in its place is encoded as any other.
    turns = [(turn.role, turn.content) for turn in text.get_turns()]
    assert tokenizer.tokenize(StringThread(turns)).token_ids != tokenizer.tokenize(text).token_ids


def test_another_tokenizers_tokens_mean_nothing(tokenizers: dict[str, ChatTokenizer]) -> None:
    drawn = draw(tokenizers["chatml"], QUESTION, tokenizers["chatml"].encode("again<|im_end|>"))
    text, other = tokenizers["chatml"].detokenize(drawn), tokenizers["mistral"]
    assert other.prompt_ids(text.user("q")) == other.prompt_ids(StringThread(text.user("q").get_turns()))
    with pytest.raises(TokenizationError, match="cannot be continued"):
        other.prompt_ids(drawn.user("q"))


def test_where_the_template_rewrites_earlier_turns_tokens_are_refused_and_text_is_rendered(
    tokenizers: dict[str, ChatTokenizer],
) -> None:
    tokenizer = tokenizers["qwen3"]
    drawn = draw(tokenizer, QUESTION, tokenizer.encode("<think>\nhm\n</think>\n\n42<|im_end|>"))
    with pytest.raises(TokenizationError, match=r"cannot be continued: .* writes turn 1 otherwise") as caught:
        tokenizer.prompt_ids(drawn.user("q"))
    assert "detokenize_thread()" in caught.value.hint
    prompt = tokenizer.decode(tokenizer.prompt_ids(tokenizer.detokenize(drawn).user("q")))
    assert "hm" not in prompt and "\n42<|im_end|>" in prompt


@pytest.mark.parametrize("family", sorted(directories.FAMILIES))
def test_an_answer_goes_on_where_it_broke_off(family: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer, end = tokenizers[family], directories.FAMILIES[family][1]
    stop = tokenizer.encode(end)[-1:]
    cut = draw(tokenizer, QUESTION, odd(tokenizer, "words ag"), finished=False)
    assert cut.generation is not None and cut.generation.finish_reason == "length"
    whole = odd(tokenizer, "words ag") + odd(tokenizer, "ain") + stop
    for begun in (cut, tokenizer.detokenize(cut)):
        assert tokenizer.unfinished_ids(begun) == cut.token_ids
        done = draw(tokenizer, begun, odd(tokenizer, "ain") + stop, continued=True)
        assert done.last_content() == whole and len(done.get_turns()) == 2
        assert done.logprobs == [-1.0 - i for i in range(8)] + [-1.0 - i for i in range(len(whole) - 8)]
        text = tokenizer.detokenize(done)
        assert (text.completion() or "").replace(" ", "") == "wordsagain" and text.generation is not None
        assert text.generation.finish_reason == "stop"
    # A text that nobody drew: what is added is weighted, what was given is not.
    given = QUESTION.assistant("words ag ")
    begun_ids = tokenizer.unfinished_ids(given)
    assert begun_ids[: len(tokenizer.prompt_ids(QUESTION))] == tokenizer.prompt_ids(QUESTION)
    done = draw(tokenizer, given, odd(tokenizer, "ain") + stop, continued=True)
    assert done.token_ids == [*begun_ids, *odd(tokenizer, "ain"), *stop]
    assert done.last_content() == [*odd(tokenizer, "ain"), *stop] and done.logprobs is not None
    # A template may trim the blank, or begin each answer with an empty thought.
    assert (tokenizer.detokenize(done).completion() or "").replace(" ", "").endswith("wordsagain")
    if family != "qwen3":  # drops the empty thought once a turn follows
        again = tokenizer.prompt_ids(tokenizer.detokenize(done).user("q"))
        assert again[: len(done.token_ids)] == done.token_ids


def test_random_drawn_tokens_are_continued(tokenizers: dict[str, ChatTokenizer]) -> None:
    rng = random.Random(0)
    tokenizer = tokenizers["chatml"]
    plain = [i for i in range(tokenizer._tokenizer.get_vocab_size()) if i not in tokenizer._added]
    refused = 0
    for _ in range(60):
        thread: TokenizedThread | StringThread = QUESTION
        for turn in range(3):
            ids = rng.choices(plain, k=rng.randrange(0, 9)) + tokenizer.encode("<|im_end|>") * rng.randrange(2)
            try:
                made = draw(tokenizer, thread, ids, finished=bool(ids) and ids[-1] in tokenizer.stop_ids)
            except TokenizationError:
                refused += 1
                break
            assert made.token_ids[: len(made.token_ids) - len(ids)] == tokenizer.prompt_ids(thread)
            thread = made.user(f"turn {turn} \n")
    assert refused <= 6
