"""Predicted over measured peak memory: full training and adapters, checkpointing or not, small and large KV pools.

    python benchmarks/memory.py [--shape NAME] [--quick] [--tiny] [--json FILE]

Each configuration is spawned, takes two optimizer steps of full micro-batches and generates a job that fills much of
its pool. The prediction is what the spawn was promised (`client.planned`); the measurement is the most that the rank's
allocator held while it worked. Layers are recomputed where the engine is given less memory than it would take without.
At the end the first configuration is spawned again: what the ranks hold must be what they held the first time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from common import Job, Row, Run, Shape, Words, engine, main, options, run_job, statistics
from msgspec.structs import replace
from shapes import packed_lengths

from harmony_core.client import HarmonyClient, TrainingModel
from harmony_core.memory.plan import plan
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc.protocol import LoraSettings, Spawn

ROWS = ("free", "limited")


@dataclass(frozen=True)
class Configuration:
    """One spawn."""

    shape: Shape
    lora: bool
    tokens: int
    kv_tokens: int

    @property
    def title(self) -> str:
        """For people."""
        kind = "LoRA" if self.lora else "full"
        return f"{kind} {self.shape.name}, {self.tokens} tokens, KV {self.kv_tokens}"

    def spawned(self, run: Run) -> Spawn:
        """As the memory plan sees it, nothing recomputed."""
        return Spawn(
            spec=ModelSpec.read(run.home.path / "weights" / self.shape.name),
            train=True,
            private=not self.lora,
            lora=LoraSettings(rank=16) if self.lora else None,
            max_batch_tokens=self.tokens,
            kv_tokens=self.kv_tokens,
            device=run.device,
            dtype="float32" if run.tiny else "bfloat16",
        )


def configurations(run: Run) -> Iterator[list[Configuration]]:
    """Kinds of training, each with its sizes: with little and much KV."""
    tokens = 128 if run.tiny else 8192
    pools = [512, 4096] if run.tiny else [16_384, 131_072]
    if run.quick:
        del pools[1:]
    for shape in run.shapes:
        kinds = (False, True) if shape.model_type == "qwen3" else (True,)
        for lora in kinds:
            yield [Configuration(shape, lora, tokens, pool) for pool in pools]


class Memory:
    """Measures configurations and keeps the ratios."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ratios: list[float] = []
        self.held: dict[str, list[float]] = {}
        """Of each configuration, bytes allocated right after it was spawned."""

    async def one(self, client: HarmonyClient, configuration: Configuration) -> None:
        """Spawn, work, compare, free."""
        run, shape = self.run, configuration.shape
        builder = client.model(shape.name, kv_cache_len=configuration.kv_tokens, tokens_to_generate=512)
        if configuration.lora:
            builder = builder.with_adapter(rank=16)
        model = await builder.max_seqlen(2048).spawn_train(configuration.title, configuration.tokens)
        planned = client.planned[-1]
        at_spawn = await statistics(model)
        await self.train(model, configuration)
        at_training = await statistics(model)
        job = await self.generate(model, configuration)
        await model.dealloc()
        self.held.setdefault(configuration.title, []).append(at_spawn.get("memory_allocated", 0.0))
        peak = max(at_training.get("memory_peak_allocated", 0.0), job.peak_bytes)
        total = float(planned["bytes"]["total"])
        recomputed = planned["checkpointed_layers"]
        note = f"predicted {total / 2**30:.2f} GiB, peak {peak / 2**30:.2f}; {recomputed} layers recomputed"
        detail = {
            "planned": planned,
            "at_spawn": at_spawn,
            "at_training": at_training,
            "generating_bytes": job.peak_bytes,
        }
        if peak:
            self.ratios.append(total / peak)
        title = f"memory, {configuration.title}, {recomputed} of {shape.layers} layers recomputed"
        run.report.add(Row(title, total / peak if peak else None, note=note, detail=detail))

    async def train(self, model: TrainingModel, configuration: Configuration) -> None:
        """Two steps of one full micro-batch each."""
        words = Words(configuration.shape, seed=5)
        longest = min(2048, configuration.tokens // 2)
        for _ in range(2):
            threads = [words.sample(n) for n in packed_lengths(configuration.tokens, 365.0, 0.8, longest)]
            await asyncio.gather(*(model.train_language_modelling(thread) for thread in threads))
            await model.optim_step(1e-6, 0.0, 1.0)

    async def generate(self, model: TrainingModel, configuration: Configuration) -> Job:
        """A job that fills much of the pool."""
        words = Words(configuration.shape, seed=6)
        prompt, new = (32, 4) if self.run.tiny else (512, 16)
        count = min(256, configuration.kv_tokens // (prompt + new + 16))
        return await run_job(model.inf(), [words.prompt(prompt) for _ in range(count)], new)

    async def again(self, client: HarmonyClient, configuration: Configuration) -> None:
        """What a second spawn of a configuration holds over what the first held, others in between."""
        await self.one(client, configuration)
        first, *_, last = self.held[configuration.title]
        note = f"{first / 2**30:.2f} GiB after the first spawn, {last / 2**30:.2f} after the last"
        row = Row(
            "memory, spawned again over the first time", last / first if first else None, 1.01, most=True, note=note
        )
        self.run.report.add(row)

    async def group(self, configurations: list[Configuration], memory: int | None, again: bool = False) -> None:
        """Configurations one after the other on one set of ranks; with `again`, the first once more."""
        async with engine(self.run, memory=memory) as client:
            for configuration in configurations:
                await self.run.part(configuration.title, lambda c=configuration: self.one(client, c))  # type: ignore[misc]
            if again:
                await self.run.part("spawned again", lambda: self.again(client, configurations[0]))

    def limit(self, configurations: list[Configuration]) -> int:
        """What the largest of them takes with every layer recomputed."""
        most = 0
        for configuration in configurations:
            shape, layers = configuration.spawned(self.run), configuration.shape.layers
            totals = (plan(replace(shape, checkpointed_layers=n)).total for n in (layers - 1, layers))
            most = max(most, min(totals) + (64 << 20))
        return most

    def summary(self) -> None:
        """The worst ratio, which must lie between 0.90 and 1.10: as the distance from 1."""
        worst = max((abs(ratio - 1) for ratio in self.ratios), default=None)
        spread = f"{min(self.ratios):.3f} to {max(self.ratios):.3f}" if self.ratios else "nothing measured"
        note = f"predicted over measured: {spread} in {len(self.ratios)} configurations"
        row = Row(
            "memory, largest distance of a ratio from 1", worst, *self.run.goals(0.10, 0.05), most=True, note=note
        )
        self.run.report.add(row)


async def measure(run: Run) -> None:
    """Every configuration."""
    memory = Memory(run)
    kinds = list(configurations(run))
    if run.wants("free"):
        await run.part("free", lambda: memory.group([c for kind in kinds for c in kind], None, True))
    if run.wants("limited") and not run.quick:
        for kind in kinds:
            limit = None if run.tiny else memory.limit(kind)
            await run.part(f"limited: {kind[0].title}", lambda k=kind, m=limit: memory.group(k, m))  # type: ignore[misc]
    memory.summary()


if __name__ == "__main__":
    main(options("memory", ("qwen3-1.7b", "llama-3.1-8b"), ROWS).parse_args(), measure)
