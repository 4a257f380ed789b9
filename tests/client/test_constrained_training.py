"""Training and scoring of constrained completions through the handles: over the tokens that the grammar allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms.tangents import push_weights, recorded_logprobs, score
from harmony_core.client import TrainingModel
from harmony_core.client.allowed_tokens import AllowedTokens, packed
from harmony_core.errors import DataError, UsageError
from harmony_core.grammar import Constraint
from harmony_core.rpc.wire import unpack_ints
from harmony_core.text.threads import StringThread, TokenizedThread

TINY = "builtin:tiny-lm"
CHOICE = Constraint("choice", '["yes", "no", "nothing"]')


async def spawn(engine: LiveEngine, name: str, **settings: Any) -> TrainingModel:
    builder = engine.client.model(TINY, kv_cache_len=2048).tp(settings.get("tp", 1))
    return await (builder.with_adapter() if settings.get("adapter") else builder).spawn_train(name, 256)


def answered(model: TrainingModel, text: str, constraint: Constraint | None = CHOICE, **record: Any) -> TokenizedThread:
    """A thread with a completion as if the model had drawn it under the constraint."""
    tokenizer, thread = model._live.tokenizer, StringThread([("user", "is it?")])
    ids = [*tokenizer.encode(text), min(tokenizer.stop_ids)]
    numbers = {"logprobs": [-1.0] * len(ids), "masked_logprobs": [-1.0] * len(ids), "versions": [0] * len(ids)} | record
    prompt = tokenizer.prompt_ids(thread)
    return tokenizer.with_completion(thread, prompt, ids, constraint=constraint, model=model._live.name, **numbers)


async def by_hand(model: TrainingModel, thread: TokenizedThread) -> list[float]:
    """The log-probs of the last turn over the allowed tokens, from raw log-probs of each of them."""
    turn, found = thread.token_turns[-1], []
    drawn = thread.token_ids[turn.start : turn.end]
    allowed = model._live.grammar.replay(CHOICE, drawn)
    for place, (token, row) in enumerate(zip(drawn, allowed.index, strict=True)):
        before, words = thread.token_ids[: turn.start + place], allowed.masks[row].tolist()
        every = [i for i in range(model._live.version.spec.vocab_size) if words[i // 32] >> (i % 32) & 1]
        raw = {i: (await model.raw_logprobs([*before, i]))[-1] for i in every}
        found.append(raw[token] - math.log(sum(map(math.exp, raw.values()))))
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_log_probs_are_over_the_allowed_tokens(one_rank: LiveEngine, two_ranks: LiveEngine, tp: int) -> None:
    engine = one_rank if tp == 1 else two_ranks

    async def work() -> None:
        model = await spawn(engine, "scored", tp=tp)
        thread = answered(model, "nothing")
        expected = await by_hand(model, thread)
        assert expected[3] == pytest.approx(0, abs=1e-6), "after 'not' only 'h' may follow"
        assert await model.logprobs_per_token(thread) == pytest.approx(expected, abs=1e-5)
        text = await model.detokenize_thread(thread)
        assert await model.logprobs(text) == pytest.approx(sum(expected), abs=1e-4)
        assert await model.logprobs_per_token(await model.tokenize_thread(text)) == pytest.approx(expected, abs=1e-5)
        free = await model.logprobs_per_token(answered(model, "nothing", None))
        assert all(one < other for one, other in zip(free, expected, strict=True))
        await model.dealloc()

    engine.run(work())


@pytest.mark.parametrize("adapter", [False, True])
def test_every_loss_compares_with_the_masked_log_probs(one_rank: LiveEngine, adapter: bool) -> None:
    """Own samples beside free ones: the ratio is 1, and the recorded log-probs are those of the trainer."""

    async def work() -> None:
        model = await spawn(one_rank, "compared", adapter=adapter)
        old = await model.logprobs_per_token(answered(model, "no"))
        mine = answered(model, "no", masked_logprobs=old)
        assert recorded_logprobs(model, mine) == old
        ones, same = [1.0] * len(old), [old, old]
        free = await model.tokenize_thread(pair("is it?", "maybe"))
        calls: dict[str, Any] = {
            "grpo": lambda: model.train_grpo(mine, *same, ones, 0.1, 0.1),
            "ppo": lambda: model.train_ppo(mine, old, ones, 0.1, importance_cap=2.0, entropy_bonus=0.1),
            "gspo": lambda: model.train_gspo(mine, *same, [1.0], 0.1, 0.1, 0.1),
        }
        for name, call in calls.items():
            await call()
            if name == "grpo":
                await model.train_grpo(free, *[await model.logprobs_per_token(free)] * 2, [1.0] * 6, 0.1, 0.1)
            metrics = await model.optim_step(0.0, 0.0, 1.0)
            assert metrics["inner_kl_div"] < 1e-8 and metrics["pg_clipfrac"] == 0, name
            assert metrics["sampler_logprob_diff_max"] < 1e-4, name
            mine = answered(model, "no", masked_logprobs=old, versions=[model.get_optim_step()] * len(old))
        total = sum(old)
        await model.train_dpo(
            mine, answered(model, "yes"), total, await model.logprobs(answered_text(model, "yes")), 0.1
        )
        assert abs((await model.optim_step(0.0, 0.0, 1.0))["reward_margin"]) < 1e-5
        for train in (model.train_language_modelling(mine), push_weights(model, await score(model, mine))):
            mine = answered(model, "no", masked_logprobs=old, versions=[model.get_optim_step()] * len(old))
            await train
            metrics = await model.optim_step(0.0, 0.0, 1.0)
            assert metrics["loss"] == pytest.approx(-total / len(old), abs=1e-5)
        await model.dealloc()

    one_rank.run(work())


def test_equal_masks_are_sent_once() -> None:
    samples = [(2, AllowedTokens([1, 2], [b"one_", b"two_"])), (1, None), (2, AllowedTokens([0, 1], [b"two_"]))]
    index, masks = packed(samples)
    assert (unpack_ints(index), masks) == ([1, 2, 0, 0, 2], b"one_two_")
    assert packed([(3, None)]) == (b"", b"")


def answered_text(model: TrainingModel, text: str) -> StringThread:
    return model._live.tokenizer.detokenize(answered(model, text))


def test_what_cannot_be_renormalised_is_refused_by_name(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await spawn(one_rank, "refused")
        ones = [1.0] * 3
        with pytest.raises(
            UsageError, match="train_ppo cannot renormalise a completion with a choice constraint: token"
        ):
            await model.train_ppo(answered(model, "ny"), ones, ones, 0.1)
        with pytest.raises(UsageError, match=r"train_language_modelling cannot .* not all drawn under it"):
            await model.train_language_modelling(answered(model, "no", masked_logprobs=[-1.0]))
        with pytest.raises(UsageError, match="logprobs cannot renormalise"):
            await model.logprobs_per_token(answered(model, "ny"))
        *ids, last = answered(model, "no").token_ids
        with pytest.raises(DataError, match="are not inp_tokens and the last of tgt_tokens"):
            tangents = [0.0] * len(ids)
            await model.train_tangents(ids, [], tangents, [*ids[1:], last], thread=answered(model, "yes"))
        text = StringThread(answered_text(model, "ny").get_turns())
        assert len(await model.logprobs_per_token(await model.tokenize_thread(text))) == 3
        await model.dealloc()

    one_rank.run(work())
