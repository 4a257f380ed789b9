"""The loss head beside a dense one: memory and time of 16,384 tokens over a vocabulary of 151,936.

    python benchmarks/loss_head.py [--quick] [--tiny] [--json FILE]

Forward and backward of the head alone, gradients of hidden states and head weight included, in one process with the
engine's own module; a recipe cannot call it by itself. Extra memory is the most that is allocated meanwhile beyond
what is there afterwards (the two gradients). The dense head is one matrix product, float32 logits, and torch's
cross-entropy.
"""

from __future__ import annotations

from dataclasses import replace

from common import Row, Run, ensure, main, options
from shapes import QWEN3_1B7, TINY_QWEN3

ROWS = ("head",)


async def measure(run: Run) -> None:
    """Both rows."""
    shape = replace(TINY_QWEN3 if run.tiny else QWEN3_1B7, layers=1)
    shape = replace(shape, name=f"{shape.name}-head")
    tokens = 256 if run.tiny else 16_384
    ensure(run, shape)

    async def head() -> None:
        found = await run.beside.acall(
            "loss_head",
            directory=str(run.home.path / "weights" / shape.name),
            rows=tokens,
            repeats=3 if run.quick else 7,
        )
        extra, dense = found["own_bytes"] / 2**30, found["dense_bytes"] / 2**30
        ratio = found["own_seconds"] / found["dense_seconds"]
        sizes = f"{tokens:,} tokens × {shape.vocab:,}"
        goals = (run.goals(2.0, 1.0), run.goals(1.2, 1.0))
        note = "not measured on a CPU" if run.tiny else f"{sizes}; dense {dense:.2f} GiB"
        row = Row(
            "loss head, extra memory",
            None if run.tiny else extra,
            *goals[0],
            unit="GiB",
            most=True,
            note=note,
            detail=found,
        )
        run.report.add(row)
        differences = ", ".join(f"{value:.1e}" for value in found["differences"])
        note = (
            f"{found['own_seconds'] * 1e3:.1f} ms, dense {found['dense_seconds'] * 1e3:.1f} ms; "
            f"relative differences of loss, hidden and weight gradients: {differences}"
        )
        run.report.add(Row("loss head, time over the dense head", ratio, *goals[1], most=True, note=note, detail=found))

    await run.part("head", head)


if __name__ == "__main__":
    main(options("loss_head", (), ROWS).parse_args(), measure)
