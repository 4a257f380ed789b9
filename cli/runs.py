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
    """Runs with their status, exit code and whether they can be resumed, the newest first."""
    from .resume import why_not

    records = list_runs(Home.open())[:limit]
    rows = [("ID", "STATUS", "EXIT", "RESUME", "RECIPE", "STARTED")]
    for record in records:
        values = record.data
        exit_code = values.get("exit")
        shown = "-" if exit_code is None else str(exit_code)
        resume = "yes" if why_not(record) is None else "-"
        rows.append((record.id, record.status, shown, resume, str(values.get("name")), str(values.get("started"))))
    output.answer(json, {"runs": [_data(record) for record in records]}, *output.table(rows))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="An id, a part of one, or `last`.")] = "last", json: Json = False
) -> None:
    """A run's status, result, saved models and errors, where its files are, and how it is resumed."""
    record = find_run(Home.open(), run)
    result = _result(record)
    found = _data(record)
    if resume := found["resume"]:
        found["resume"] = "{command}  ({checkpoint}: {stage}, step {step})".format_map(resume)
    shown = [*found.items(), ("result", result.get("result"))]
    shown += [("saved", model.get("ref")) for model in result.get("models", ())]
    shown += [("error", line) for error in result.get("errors", ()) for line in error.get("lines", ())]
    lines = [f"{n:10} {v if isinstance(v, str) else output.dumped(v)}" for n, v in shown if v is not None]
    output.answer(json, {"run": _data(record), "outcome": result}, *lines)


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
    output.answer(json, {"run": record.id, "report": str(file)}, str(file))
    if open_ is Open.yes or (open_ is Open.auto and not json and _has_display()):
        webbrowser.open(file.as_uri())


def _has_display() -> bool:
    displays = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(displays) and sys.stdout.isatty()


def _data(record: RunRecord) -> dict[str, Any]:
    from .resume import where_it_goes_on

    shown = {name: record.data.get(name) for name in ("name", "started", "ended", "exit", "cwd")}
    page = record.directory / "report.html"
    places = {"directory": str(record.directory), "report": str(page) if page.is_file() else None}
    return {"id": record.id, "status": record.status, **shown, **places, "resume": where_it_goes_on(record)}


def _result(record: RunRecord) -> dict[str, Any]:
    try:
        found = json_module.loads((record.directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
