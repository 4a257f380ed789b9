"""The table of data shapes in docs/datasets.md: made by reading every example from files of every kind.

`python tests/dataset_table.py` writes it into the page; a test compares.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from harmony_core.data.datasets import load_threads
from harmony_core.errors import DataError
from public_rows import EXAMPLES, Example, Row

PAGE = Path(__file__).resolve().parent.parent / "docs" / "datasets.md"
BEGIN, END = "<!-- table of shapes: python tests/dataset_table.py -->\n", "<!-- end of the table -->\n"


def json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow_table(rows: list[Row]) -> pa.Table:
    """Every row has every column, as in a table."""
    names = {name: None for row in rows for name in row}
    return pa.Table.from_pylist([{**names, **row} for row in rows])


def as_parquet(rows: list[Row]) -> bytes:
    parquet.write_table(arrow_table(rows), file := io.BytesIO())
    return file.getvalue()


def as_arrow(rows: list[Row], new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    table, file = arrow_table(rows), io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def as_csv(rows: list[Row]) -> bytes:
    """Lists and objects as JSON text."""
    names = list({name: None for row in rows for name in row})
    writer = csv.writer(file := io.StringIO())
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return file.getvalue().encode()


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "rows.jsonl": json_lines,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
    "stream.arrow": lambda rows: as_arrow(rows, pa.ipc.new_stream),
    "rows.csv": as_csv,
}
"""A file's name, and its bytes for rows."""


def outcome(example: Example, folder: Path, name: str) -> tuple[Any, ...] | str:
    """The turns that a file of one row gives, or why it is refused."""
    file = folder / name
    file.write_bytes(WRITERS[name]([example.row]))
    try:
        (thread,) = load_threads(file, kind=example.kind, columns=example.columns, roles=example.roles)  # type: ignore[arg-type]
    except DataError as error:
        return error.message.removeprefix(f"{file}:").partition(": ")[2]
    return tuple((turn.role, turn.text, turn.weight) for turn in thread.turns)


def cell(found: tuple[Any, ...] | str) -> str:
    if isinstance(found, str):
        return f"refused: {found}".replace("|", "\\|")
    return ", ".join(f"**{role}**" if weight else role for role, _, weight in found)


def table() -> str:
    lines = ["| rows like those of | columns | JSON, Parquet, Arrow | CSV |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as temporary:
        for example in EXAMPLES:
            found, of_csv = (outcome(example, Path(temporary), name) for name in ("rows.jsonl", "rows.csv"))
            told = ", ".join(f"`{name}`" for name in example.row)
            mapped = "".join(
                f", `{k}: {json.dumps(v).replace(chr(34), '')}`"
                for k, v in (("columns", example.columns), ("roles", example.roles))
                if v
            )
            asked = f", asked for as {example.kind}" if example.kind else ""
            last = "the same" if found == of_csv else cell(of_csv)
            lines.append(f"| {example.name} | {told}{mapped}{asked} | {cell(found)} | {last} |")
    return "\n".join(lines) + "\n"


def page_with_table() -> str:
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(), "utf-8")
