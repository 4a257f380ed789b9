"""`adaptive graders ...`: the graders of this machine from a shell. Results go to stdout, remarks to stderr."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec
import typer

from harmony_core.config.parameters import Dataset
from harmony_core.errors import DataError, UsageError
from harmony_core.graders import BaseGrader, Grader, GraderRegistry, grade_or_refuse
from harmony_core.home import Home
from harmony_core.plain_files import plain
from harmony_core.recipe.context import RecipeConfig, RecipeContext
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread

from . import output

app = typer.Typer(
    name="graders",
    help="Graders by key: add, look at, try, serve, remove.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The grader's name.")]
Named = Annotated[str, typer.Argument(metavar="KEY", help="A key, builtin:NAME, FILE.py[:FUNCTION] or a YAML file.")]
_SHOWN = 48
_REASON = 300


@app.command()
def add(
    key: Key,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="FILE.py[:FUNCTION], or a YAML file that describes a judge.")
    ],
    as_json: Json = False,
) -> None:
    """Store a copy of a grader's file under KEY."""
    record = GraderRegistry(Home.open()).add(key, source)
    output.answer(as_json, {"grader": msgspec.to_builtins(record)}, record.key)


@app.command("list")
def list_graders(as_json: Json = False) -> None:
    """Every key; the builtin ones last."""
    known = GraderRegistry(Home.open(writes=False))
    rows = [(key, "" if key.startswith("builtin:") else known.get(key).source) for key in known.names()]
    found = [{"key": key, "source": source or None} for key, source in rows]
    output.answer(as_json, {"graders": found}, *output.table([("KEY", "SOURCE"), *rows]))


@app.command()
def show(key: Named, as_json: Json = False) -> None:
    """What a key is, and the text of its file."""
    known = GraderRegistry(Home.open(writes=False))
    found = known.find(key)
    text = found.file.read_text(encoding="utf-8", errors="replace") if found.file else ""
    stored = msgspec.to_builtins(known.get(key)) if key in known.names() and not found.builtin else {"key": key}
    lines = [f"{name:<10} {value}" for name, value in stored.items() if value]
    output.answer(as_json, {"grader": stored | {"text": text or None}}, *lines, *([text.rstrip()] if text else []))


@app.command()
def test(
    key: Named,
    dataset: Annotated[str, typer.Option("--dataset", metavar="FILE", help="Rows that end with an answer to grade.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows to grade, from the first on.")] = 20,
    as_json: Json = False,
) -> None:
    """Grade the answers of a dataset: a table of samples, grades and reasons; unscored ones with their reason."""
    rows = asyncio.run(_graded(key, dataset, limit))
    scores = [row["score"] for row in rows if row["score"] is not None]
    table = [("ROW", "SCORE", "ANSWER", "REASON")]
    for row in rows:
        score = "unscored" if row["score"] is None else f"{row['score']:g}"
        table.append((str(row["row"]), score, _short(row["answer"]), _short(row["reason"], _REASON)))
    mean = sum(scores) / len(scores) if scores else None
    told = "none is scored" if mean is None else f"mean {mean:g} of {len(scores)} scored"
    answer = {"samples": rows, "mean": mean, "scored": len(scores), "unscored": len(rows) - len(scores)}
    output.answer(as_json, answer, *output.table(table), f"{told}, {len(rows) - len(scores)} unscored")


def _short(text: str | None, shown: int = _SHOWN) -> str:
    line = output.clean(" ".join((text or "").split()))
    return line if len(line) <= shown else line[: shown - 3] + "..."


async def _graded(key: str, dataset: str, limit: int) -> list[dict[str, Any]]:
    threads = (await Dataset.model_validate(dataset).load())[:limit]
    if all(thread.completion() is None for thread in threads):
        raise UsageError(f"no row of {dataset} ends with an assistant turn", hint="there is nothing to grade")
    async with _opened(key) as grader:
        return list(await asyncio.gather(*(_row(grader, row, thread) for row, thread in enumerate(threads, 1))))


async def _row(grader: BaseGrader[Any], row: int, thread: StringThread) -> dict[str, Any]:
    found = {"row": row, "answer": thread.completion() or "", "score": None, "reason": None, "unscored": None}
    try:
        grade = await grade_or_refuse(grader, thread)
    except DataError as error:
        return found | {"reason": error.message, "unscored": error.code}
    return found | {"score": plain(grade.value), "reason": grade.reasoning}


@contextlib.asynccontextmanager
async def _opened(key: str) -> Any:
    """The grader; a judge comes with an engine of its own."""
    source = Grader(grader_key=key).check(Registry(Home.open()))
    if source.model_key is None:
        yield await source.load(None)
        return
    async with RecipeContext.from_config(RecipeConfig(name="graders")) as ctx:
        yield await source.load(ctx)


@app.command("rm")
def remove(keys: Annotated[list[str], typer.Argument(metavar="KEY...")], as_json: Json = False) -> None:
    """Delete stored graders."""
    known = GraderRegistry(Home.open())
    for key in keys:
        known.remove(key)
    output.answer(as_json, {"removed": keys}, *(f"removed {key}" for key in keys))


@app.command()
def serve(
    key: Named,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Serve a grader over HTTP on this machine, until Ctrl-C. Prints its address and the token that it asks for."""
    from harmony_core.graders.server import RewardServer

    async def run() -> None:
        async with _opened(key) as grader:
            server = RewardServer(grader, port)
            output.data(server.url)
            output.data(f"ADAPTIVE_REWARD_TOKEN={server.token}")
            await server.serve()

    asyncio.run(run())
