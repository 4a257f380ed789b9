"""What a grammar costs: tokens/s of constrained requests over those of unconstrained ones, at equal token counts.

    python benchmarks/constrained.py [--shape NAME] [--quick] [--tiny] [--json FILE]
    python benchmarks/constrained.py --model smollm2 [--new N] [--rounds N] [--json FILE]

64 requests at once. The schema is an array of at least 1,000 records with strings, integers and choices, so that no
completion ends before its limit; unconstrained ones seldom do. A second row has strings of at most 40 characters: a
mask within such a string takes many times as long. Both kinds run in turn, after one of each that
is not counted, and the row is the median of the ratios. With `--model`, a registry key, the ranks are on the CPU, and
completions are drawn at temperature 1; the random weights of a shape are greedy. The vocabulary of a shape here is one
of bytes and made-up words, as long as those of real tokenizers, since a mask's cost depends on the bytes of its tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import Row, Run, Shape, engine, main, options, run_job
from report import Report, machine
from shapes import SPECIAL
from tokenizers.pre_tokenizers import ByteLevel

from harmony_core.client import EngineOptions, HarmonyClient, InferenceModel
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread

ROWS = ("constrained",)
REQUESTS = 64
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": RECORD, "minItems": 1000})
BOUNDED = SCHEMA.replace('"string"}', '"string", "maxLength": 40}')
TOPICS = ("the sea", "a lighthouse", "old friends", "the winter", "a market", "two brothers", "the moon", "a train")


def byte_tokenizer(shape: Shape) -> dict[str, Any]:
    """A tokenizer.json whose tokens are the bytes and made-up words."""
    draw, alphabet = random.Random(0), sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys((*SPECIAL, *alphabet))
    parts = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "in", "er", "on", "al", "y")]
    marks = ['"', '":', '",', '{"', "}", "[", "]", " {", "},", '"]', "..", "()", "==", "\u010a", "\u0120\u0120"]
    while len(tokens) < shape.vocab:
        kind = draw.random()
        if kind < 0.05:
            word = "".join(draw.choice(marks) for _ in range(draw.randint(1, 3)))
        else:
            word = "".join(draw.choice(parts) for _ in range(draw.randint(1, 4)))
            word = word.capitalize() if kind > 0.85 else word
        tokens.setdefault(draw.choice(("", "\u0120")) + word)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(SPECIAL)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": []},
    }


def with_bytes(run: Run, shape: Shape) -> str:
    """The key of the shape with `byte_tokenizer`; the weights are the same file."""
    key, written = f"{shape.name}-bytes", run.home.path / "weights" / shape.name
    directory = written.with_name(key)
    shutil.copytree(written, directory, copy_function=os.link, dirs_exist_ok=False)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer(shape)), encoding="utf-8")
    Registry(run.home).add(key, str(directory), reference=True)
    return key


def prompts(seed: int) -> list[StringThread]:
    """Different ones each time."""
    draw = random.Random(seed)
    texts = (
        f"Write a long story about {draw.choice(TOPICS)}, with {draw.randint(10, 99)} people." for _ in range(REQUESTS)
    )
    return [StringThread([("user", text)]) for text in texts]


Goals = tuple[float | None, float | None]


async def compare(
    model: InferenceModel, name: str, goals: Goals, new: int, rounds: int, temperature: float, schema: str = SCHEMA
) -> Row:
    """Both kinds of requests in turn."""
    kinds = {"constrained": model.constrained_decoding(schema), "free": model}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    counts = dict.fromkeys(kinds, 0)
    for turn in range(rounds + 1):
        for number, (kind, handle) in enumerate(kinds.items()):
            job = await run_job(handle, prompts(2 * turn + number), new if turn else 4, temperature)
            if turn:
                speeds[kind].append(job.new_tokens / job.wall)
                steps[kind].append(job.step_seconds * 1e3)
                counts[kind] += job.new_tokens
    ratio = statistics.median(a / b for a, b in zip(speeds["constrained"], speeds["free"], strict=True))
    note = "; ".join(
        f"{kind} {statistics.median(speeds[kind]):,.0f} tok/s, step {statistics.median(steps[kind]):.2f} ms"
        for kind in kinds
    )
    detail = {"tokens_per_second": speeds, "step_ms": steps, "tokens": counts}
    return Row(f"constrained over free, {REQUESTS}: {name}", ratio, *goals, note=note, detail=detail)


async def measure(run: Run) -> None:
    """A row for each shape."""
    new, rounds = (8, 1) if run.tiny else (128, 2) if run.quick else (256, 5)
    for shape in run.shapes:

        async def part(shape: Shape = shape) -> None:
            async with engine(run) as client:
                builder = client.model(with_bytes(run, shape), tokens_to_generate=new).max_seqlen(1024)
                model = await builder.spawn_inference("constrained")
                run.report.add(await compare(model, shape.name, run.goals(0.9, 0.95), new, rounds, 0.0))
                name = f"{shape.name}, bounded strings"
                run.report.add(await compare(model, name, (None, None), new, rounds, 0.0, BOUNDED))

        await run.part(f"constrained {shape.name}", part)


async def on_cpu(chosen: Namespace) -> None:
    """The row of a registered model on the CPU."""
    report = Report("constrained", chosen.json, machine())
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineOptions(log_dir=Path(folder), run_id="constrained", num_processes=1, device="cpu")
        async with HarmonyClient.start(settings, Registry(Home.open()), lambda *_: None) as client:
            model = await client.model(chosen.model, tokens_to_generate=chosen.new).spawn_inference("constrained")
            name = f"{chosen.model}, CPU"
            report.add(await compare(model, name, (0.9, 0.95), chosen.new, chosen.rounds, 1.0))
    report.finish()


if __name__ == "__main__":
    parser = options("constrained", ("qwen3-1.7b",), ROWS)
    parser.add_argument("--model", help="a registry key, to measure on the CPU")
    parser.add_argument("--new", type=int, default=64, help="tokens of each completion on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="on the CPU")
    asked = parser.parse_args()
    if asked.model:
        asyncio.run(on_cpu(asked))
    else:
        main(asked, measure)
