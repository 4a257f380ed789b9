"""A recipe written against the documented API, as its authors write them."""

from adaptive_harmony import StringThread
from adaptive_harmony.core.utils import async_map
from adaptive_harmony.parameters import Dataset, Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main


class Config(InputConfig):
    model_to_train: Model[model_kinds.Trainable]
    judge: Model
    dataset: Dataset
    steps: int = 2


@recipe_main
async def main(config: Config, ctx: RecipeContext):
    builder = await config.model_to_train.to_builder(ctx, tp=1, kv_cache_len=10_000, tokens_to_generate=32)
    policy = await builder.with_adapter().spawn_train("policy", 4096)
    judge = await (await config.judge.to_builder(ctx, kv_cache_len=4096)).spawn_inference("judge")
    threads = (await config.dataset.load(ctx))[:16]
    before = sum(await async_map(policy.logprobs, threads))
    for _ in range(config.steps):
        await async_map(policy.train_language_modelling, threads)
        await policy.optim_step(1e-2, 0.0, 1.0)
    after = sum(await async_map(policy.logprobs, threads))
    answers = await async_map(policy.inf().temperature(0.7).generate, [StringThread(t.messages()) for t in threads])
    unchanged = sum(await async_map(judge.logprobs, threads))
    key = await policy.save("judged", ctx=ctx)
    ctx.gate("learned", after - before, ">", 0)
    ctx.gate("judge stays", unchanged - before, ">", -1e-2)
    return {"key": key, "gain": after - before, "answers": len([a for a in answers if a.completion() is not None])}
