"""`adaptive runs`: lists, shows, reports and removes the runs of this machine."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import webbrowser
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harmony_core.errors import (
    ConflictError,
    HarmonyError,
    NotFoundError,
    VerificationError,
    storing,
)
from harmony_core.home import Home
from harmony_core.memory.ledger import format_size
from harmony_core.options import seconds
from harmony_core.plain_files import discard, refuse_links, size_of, try_lock
from harmony_core.registry.publish import sweep
from harmony_core.runs.records import FILES, RunRecord, find_run, list_runs
from harmony_core.runs.resuming import where_it_goes_on, why_not

from . import output

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, the newest first.")] = 20, json: Json = False
) -> int:
    """Runs with their status, exit code and whether they can be resumed, the newest first; 7 where one is damaged."""
    records = list_runs(Home.open(writes=False))[:limit]
    rows = [("ID", "STATUS", "EXIT", "RESUME", "RECIPE", "STARTED")]
    for record in records:
        values = record.data
        exit_code = values.get("exit")
        shown = "-" if exit_code is None else str(exit_code)
        resume = "yes" if why_not(record) is None else "-"
        rows.append((record.id, record.status, shown, resume, str(values.get("name")), str(values.get("started"))))
    damaged = [f"run {record.id}: {record.problem}" for record in records if record.problem]
    code = VerificationError.exit_code if damaged else 0
    shown_runs = [_data(record) for record in records]
    output.answer(json, {"runs": shown_runs, "damaged": damaged}, *output.table(rows), ok=not damaged, code=code)
    for line in damaged:
        output.tell(f"error: {line}")
    return code


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="An id, a part of one, or `last`.")] = "last", json: Json = False
) -> None:
    """A run's status, result, saved models, artifacts and errors, where its files are, and how it is resumed."""
    record = find_run(Home.open(writes=False), run)
    _check(record)
    result = record.read("result.json")
    found = _data(record)
    if resume := found["resume"]:
        found["resume"] = "{command}  ({checkpoint}: {stage}, step {step})".format_map(resume)
    shown = [*found.items(), ("result", result.get("result"))]
    shown += [("saved", model.get("ref")) for model in result.get("models", ())]
    artifacts = record.artifacts()
    shown += [("artifact", _artifact(entry, record.directory)) for entry in artifacts]
    shown += [("error", line) for error in result.get("errors", ()) for line in error.get("lines", ())]
    lines = [f"{n:10} {v if isinstance(v, str) else output.dumped(v)}" for n, v in shown if v is not None]
    output.answer(json, {"run": _data(record), "outcome": result, "artifacts": artifacts}, *lines)


def _artifact(entry: dict[str, Any], directory: Path) -> str:
    """An artifact in one line: name, kind, number of samples, size and path."""
    metadata = entry["metadata"] if isinstance(entry["metadata"], dict) else {}
    facts = [str(entry["kind"])]
    facts += [f"{metadata['sample_count']} samples"] if "sample_count" in metadata else []
    facts += [format_size(entry["bytes"])] if isinstance(entry["bytes"], int) else []
    facts += [str(directory / str(entry["path"]))] if entry["path"] else []
    return f"{entry['name']}: {', '.join(facts)}"


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
    from harmony_core.runs.report.page import write_report

    record = find_run(Home.open(writes=output_file is None), run)
    with storing(f"cannot write the report to {output_file or record.directory}"):
        file = write_report(record.directory, output_file, status=record.status).absolute()
    output.answer(json, {"run": record.id, "report": str(file)}, str(file))
    _check(record, "events.jsonl")
    if open_ is Open.yes or (open_ is Open.auto and not json and _has_display()):
        webbrowser.open(file.as_uri())


@app.command("rm")
def remove(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids, parts of them, or `last`.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Runs that can be resumed, too.")] = False,
    json: Json = False,
) -> None:
    """Delete runs with their checkpoints; models that they saved stay. One that runs or can be resumed is refused."""
    home = Home.open()
    records = list({record.id: record for record in (find_run(home, run) for run in runs)}.values())
    for record in records if not force else ():
        record.require()
    refused = [reason for record in records if (reason := _needed(record, force))]
    if refused:
        hint = "" if force else "with --force, runs that can be resumed are removed too; one that is running never is"
        raise ConflictError("\n".join(refused), hint=hint, runs=[record.id for record in records])
    removed = []
    for record in records:
        freed = _remove(home, record)
        removed.append({"id": record.id, "bytes": freed})
        if not json:
            output.data(f"removed {record.id}, {format_size(freed)} freed")
    if json:
        output.answer(json, {"removed": removed})


@app.command()
def gc(
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Runs that ended so long ago: 30d, 12h.  [default: 30d]"),
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", metavar="N", min=0, help="All but the newest N, of any age.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Delete runs that have ended, by age or number; with both options those to which both apply.

    Models that they saved stay, and so does every run that is running or can be resumed.
    """
    home = Home.open()
    if older_than is None and keep is None:
        older_than = "30d"
    before = time.time() - (0.0 if older_than is None else seconds(older_than, "--older-than"))
    found = [record for record in list_runs(home)[keep or 0 :] if _ended_at(record) <= before]
    removed: list[dict[str, Any]] = []
    kept: list[dict[str, str]] = []
    for record in found:
        reason = _needed(record)
        try:
            if not reason:
                freed = size_of(record.directory) if dry_run else _remove(home, record)
                removed.append({"id": record.id, "bytes": freed})
        except NotFoundError:
            continue
        except HarmonyError as error:
            reason = error.message
        if reason:
            kept.append({"id": record.id, "reason": reason})
        if not json:
            word = "would remove" if dry_run else "removed"
            output.data(f"kept: {reason}" if reason else f"{word} {record.id}, {format_size(freed)}")
    if not dry_run:
        sweep(home)
    total = sum(entry["bytes"] for entry in removed)
    told = f"{len(removed)} runs, {format_size(total)} {'would be ' if dry_run else ''}freed"
    output.answer(json, {"removed": removed, "kept": kept, "bytes": total, "dry_run": dry_run}, told)


def _remove(home: Home, record: RunRecord) -> int:
    """Delete a run's directory and return its bytes. Models that the run has saved stay.

    Raises ConflictError while the run is alive, which only its lock decides; NotFoundError if another process has
    removed it; ResourceError.
    """
    refuse_links(home.runs, record.directory)
    with storing(f"cannot remove run {record.id}"):
        try:
            # The lock is held, so that the run cannot be resumed while it is deleted.
            with (record.directory / "lock").open("a") as lock:
                if not try_lock(lock):
                    raise _is_running(record)
                size = size_of(record.directory)
                try:
                    discard(home, record.directory)
                except OSError as error:
                    if error.errno != errno.EXDEV:  # `runs` may be a link to another disk
                        raise
                    shutil.rmtree(record.directory)
        except FileNotFoundError:
            raise NotFoundError(f"run {record.id} is gone already") from None
    return size


def _is_running(record: RunRecord) -> ConflictError:
    """The error for removing a run that is alive."""
    process = f"process {record.data.get('pid')} on {record.data.get('host')}"
    return ConflictError(f"run {record.id} is running ({process})", hint="stop it, or wait until it has ended")


def _ended_at(record: RunRecord) -> float:
    """When a run ended, in seconds since 1970; for a crashed run, when its directory was last written to."""
    try:
        return datetime.fromisoformat(str(record.data["ended"])).timestamp()
    except (KeyError, ValueError):
        files = (record.directory / "events.jsonl", record.directory)
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _needed(record: RunRecord, force: bool = False) -> str:
    """The reason why a run must not be removed, or ""."""
    if record.status == "running":
        return _is_running(record).message
    if record.problem and not force:
        return f"run {record.id}: {record.problem}"
    if not force and (resume := where_it_goes_on(record)):
        return f"run {record.id} can be resumed: {resume['command']}"
    return ""


def _check(record: RunRecord, *more: str) -> None:
    """Raise VerificationError naming the damaged files of the run."""
    from harmony_core.config import load_yaml_file

    record.require(*FILES, *more)
    config = record.directory / "config.yaml"
    if config.is_file() and (issues := load_yaml_file(config, "config.yaml").issues):
        raise VerificationError(f"run {record.id}: {issues[0]}", files=["config.yaml"])


def _has_display() -> bool:
    displays = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(displays) and sys.stdout.isatty()


def _data(record: RunRecord) -> dict[str, Any]:
    shown = {name: record.data.get(name) for name in ("name", "started", "ended", "exit", "cwd")}
    page = record.directory / "report.html"
    places = {"directory": str(record.directory), "report": str(page) if page.is_file() else None}
    return {"id": record.id, "status": record.status, **shown, **places, "resume": where_it_goes_on(record)}
