"""`adaptive runs`: what was run on this machine."""

from __future__ import annotations

import json as json_module
import os
import sys
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harmony_core.errors import ResourceError
from harmony_core.home import Home
from harmony_core.run import RunRecord, find_run, list_runs

from . import output

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, the newest first.")] = 20, json: Json = False
) -> None:
    """Runs with their status and exit code, the newest first."""
    records = list_runs(Home.open())[:limit]
    if json:
        output.data(output.dumped({"ok": True, "exit": 0, "runs": [_data(record) for record in records]}))
        return
    rows = [("ID", "STATUS", "EXIT", "RECIPE", "STARTED")]
    for record in records:
        values = record.data
        exit_code = values.get("exit")
        shown = "-" if exit_code is None else str(exit_code)
        rows.append((record.id, record.status, shown, str(values.get("name")), str(values.get("started"))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        output.data("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="An id, a part of one, or `last`.")] = "last", json: Json = False
) -> None:
    """A run's status, result, saved models and errors, and where its files are."""
    record = find_run(Home.open(), run)
    result = _result(record)
    if json:
        output.data(output.dumped({"ok": True, "exit": 0, "run": _data(record), "outcome": result}))
        return
    for name, value in (_data(record) | {"result": result.get("result")}).items():
        if value is not None:
            output.data(f"{name:10} {value if isinstance(value, str) else output.dumped(value)}")
    for model in result.get("models", ()):
        output.data(f"{'saved':10} {model.get('ref')}")
    for error in result.get("errors", ()):
        for line in error.get("lines", ()):
            output.data(f"{'error':10} {line}")


class Open(StrEnum):
    """Whether to show the page in a browser; auto: on a terminal with a display."""

    auto = "auto"
    yes = "yes"
    no = "no"


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="An id, a part of one, or `last`.")] = "last",
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to.  [default: report.html in the run's folder]"),
    ] = None,
    open_: Annotated[Open, typer.Option("--open", help="Show it in a browser.")] = Open.auto,
    json: Json = False,
) -> None:
    """Write a run's report anew, one HTML file, and print where it is; of a run that is still going, too."""
    from harmony_core.report import write_report

    record = find_run(Home.open(), run)
    try:
        file = write_report(record.directory, output_file, status=record.status).absolute()
    except OSError as error:
        where = output_file or record.directory
        raise ResourceError(f"cannot write the report to {where}: {error.strerror or error}") from error
    if json:
        output.data(output.dumped({"ok": True, "exit": 0, "run": record.id, "report": str(file)}))
    else:
        output.data(str(file))
    if open_ is Open.yes or (open_ is Open.auto and not json and _has_display()):
        webbrowser.open(file.as_uri())


def _has_display() -> bool:
    displays = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(displays) and sys.stdout.isatty()


def _data(record: RunRecord) -> dict[str, Any]:
    shown = {name: record.data.get(name) for name in ("name", "started", "ended", "exit", "cwd")}
    page = record.directory / "report.html"
    places = {"directory": str(record.directory), "report": str(page) if page.is_file() else None}
    return {"id": record.id, "status": record.status, **shown, **places}


def _result(record: RunRecord) -> dict[str, Any]:
    try:
        found = json_module.loads((record.directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
