"""`adaptive datasets ...`: shows the tokens that a model would be trained on, before anything is started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any

import typer

from harmony_core.config.parameters import Dataset
from harmony_core.errors import ModelRefused, UsageError
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.text import tokenizer_files
from harmony_core.text.row_lengths import Checked, histogram, sequences
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.turns import TemplateKwargs

from . import output

app = typer.Typer(no_args_is_help=True)

_BAR = 40
_TRAINED, _PLAIN = "\x1b[32m", "\x1b[0m"


@app.callback()
def datasets() -> None:
    """Datasets: what a model would be trained on."""


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="As a recipe's dataset is written: a file, or a name.")],
    model: Annotated[str, typer.Option("--model", metavar="KEY", help="Whose chat template and tokenizer.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows to look at, from the first on.")] = 1000,
    show: Annotated[int, typer.Option("--show", min=0, help="Rows to print.")] = 3,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", min=2, help="The most tokens of a row, as in a recipe.")
    ] = 4096,
    chat_template_kwargs: Annotated[
        str, typer.Option(metavar="JSON", help="Variables for the template, over those that the model's key has.")
    ] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Print rows with the tokens that would be trained, what would be split or refused, and how long rows are."""
    version = Registry(Home.open()).resolve(model)
    if version.tokenizer_dir is None:
        raise ModelRefused(f"model {version.ref} has no tokenizer", hint="name a model with a tokenizer and a template")
    variables = TemplateKwargs(version.defaults.chat_template_kwargs) | _variables(chat_template_kwargs)
    tokenizer = ChatTokenizer(tokenizer_files.read(version.tokenizer_dir), variables)
    threads = asyncio.run(Dataset.model_validate(file).load())
    samples: list[dict[str, Any]] = []

    def parts(row: int) -> list[int]:
        found, are_pair = _parts(tokenizer, threads[row])
        if len(samples) < show:
            samples.append({"row": row + 1, "parts": [_described(tokenizer, part) for part in found]})
        lengths = [len(part.token_ids) for part in found]
        return [max(lengths)] if are_pair else lengths

    checked = Checked.of(range(min(limit, len(threads))), parts)
    bins = histogram(checked.lengths, max_batch_size)
    too_long = sum(tokens > max_batch_size for tokens in checked.lengths)
    known = {"model": version.ref, "rows": len(threads), "limit": max_batch_size, "too_long": too_long}
    answer = known | {"checked": checked.data(), "histogram": bins, "samples": samples}
    output.answer(as_json, answer, *_lines(answer, checked.describe()))


def _variables(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(values := json.loads(text), dict):
            return values
    raise UsageError(
        f"--chat-template-kwargs must be a JSON object, not {text[:60]!r}",
        hint="--chat-template-kwargs '{\"enable_thinking\": false}'",
    )


def _parts(tokenizer: ChatTokenizer, thread: StringThread) -> tuple[list[TokenizedThread], bool]:
    """The row as trained: its parts, or its prompt, or the two threads of a pair (the flag is True only for a pair)."""
    if isinstance(pair := sequences(thread), tuple):
        return [tokenizer.tokenize(side) for side in pair], True
    if any(thread.get_turn_weights()):
        return tokenizer.parts(thread), False
    return [TokenizedThread(tokenizer.prompt_ids(thread), [])], False


def _described(tokenizer: ChatTokenizer, part: TokenizedThread) -> dict[str, Any]:
    """A part's text, divided into stretches of equal weight."""
    ids, pieces, at = part.token_ids, [], 0
    for weight, group in groupby(part.token_weights):
        end = at + len(list(group))
        pieces.append([tokenizer.decode_behind(ids[:at], ids[at:end]), weight])
        at = end
    return {"tokens": len(ids), "trained": sum(weight > 0 for weight in part.token_weights), "pieces": pieces}


def _lines(answer: dict[str, Any], described: Sequence[str]) -> list[str]:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = []
    for sample in answer["samples"]:
        for number, part in enumerate(sample["parts"], 1):
            which = f" part {number} of {len(sample['parts'])}" if len(sample["parts"]) > 1 else ""
            lines.append(f"--- row {sample['row']}{which}: {part['tokens']} tokens, {part['trained']} trained")
            lines.append("".join(_marked(text, weight, coloured) for text, weight in part["pieces"]))
    checked, limit = answer["checked"], answer["limit"]
    lines.append(f"--- the first {checked['rows']} of {answer['rows']} rows for {answer['model']}")
    lines += described or ["none is split or refused"]
    most = max((count for *_, count in answer["histogram"]), default=1)
    for low, high, count in answer["histogram"]:
        bar = "#" * -(-count * _BAR // most)
        lines.append(f"{low:>7} to {high:<7} {count:>7} {bar}{' too long' if low > limit and count else ''}")
    lines.append(f"{answer['too_long']} longer than max_batch_size={limit}")
    return lines


def _marked(text: str, weight: float, coloured: bool) -> str:
    """Trained text in colour, or between {+ and +}; with its weight unless that is 1."""
    text = output.clean(text)
    if not weight:
        return text
    scale = "" if weight == 1 else f"×{weight:g} "
    return f"{_TRAINED}{scale}{text}{_PLAIN}" if coloured else f"{{+{scale}{text}+}}"
