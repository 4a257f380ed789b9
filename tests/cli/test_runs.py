"""`adaptive runs`: where a report goes and who is shown it; what is removed, and what is not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harmony_core.home import Home
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.records import list_runs
from harmony_core.runs.run import Run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages that a browser would have been asked for."""
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return pages


def test_a_run_leaves_a_report_and_says_where(adaptive: Any, shown: list[str]) -> None:
    done = adaptive("run", "hello.py", "--device", "cpu", "--lr", "0.25")
    (record,) = list_runs(Home.open())
    page = record.directory / "report.html"
    assert f"report {page}" in done.err.splitlines()
    assert "0.25" in page.read_text("utf-8") and "succeeded" in page.read_text("utf-8")
    assert adaptive("runs", "show", "--json").json["run"]["report"] == str(page)

    page.unlink()
    done = adaptive("runs", "report")
    assert (done.code, done.out) == (0, f"{page}\n") and page.is_file()
    done = adaptive("runs", "report", record.id, "--output", "mine.html", "--open", "no", "--json")
    assert done.json == {"ok": True, "exit": 0, "run": record.id, "report": str(Path("mine.html").absolute())}
    assert Path("mine.html").read_text("utf-8").startswith("<!doctype html>")
    assert shown == [], "stdout is no terminal"
    adaptive("runs", "report", "--open", "yes")
    assert shown == [page.as_uri()]


def test_a_failed_run_has_a_report(adaptive: Any) -> None:
    done = adaptive("run", "hello.py", "--device", "cpu", "--note", "raise")
    assert done.code == 1
    page = (list_runs(Home.open())[0].directory / "report.html").read_text("utf-8")
    assert "What went wrong" in page and "ValueError: as asked" in page and "driver.log" in page


def test_a_dry_run_has_none(adaptive: Any) -> None:
    assert "report" not in adaptive("run", "hello.py", "--dry-run").err


def test_what_can_go_wrong(adaptive: Any) -> None:
    assert adaptive("runs", "report").code == 3
    adaptive("run", "hello.py", "--device", "cpu")
    done = adaptive("runs", "report", "--output", "no/such/folder/x.html")
    assert done.code == 4 and "cannot write the report" in done.errors[0]
    done = adaptive("runs", "report", "--open", "maybe")
    assert done.code == 2


def made(name: str, exit_code: int | None = 0, *, checkpoint: bool = False, days: float = 0) -> Run:
    """A run, ended unless `exit_code` is None; with a checkpoint that it can be resumed from; `days` old."""
    run = Run.create(Home.open(), name)
    run.note(recipe="sft")
    (run.directory / "logs" / "rank-0.log").write_text("x" * 5000)
    if checkpoint:
        data = {"name": "SFT", "steps": {"policy": 3}, "completion_percentage": 0.5}
        with CheckpointStore(run.directory / "checkpoints").write() as writing:
            writing.commit({"data": data})
    if exit_code is not None:
        run.finish("succeeded" if exit_code == 0 else "stopped", exit_code, {}, report=False)
        ended = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        run.write_json("run.json", json.loads((run.directory / "run.json").read_text()) | {"ended": ended})
    return run


def crashed(run: Run) -> Run:
    """The run as if its process had been killed: recorded as running, its lock free."""
    assert run._lock is not None
    run._lock.close()
    run._lock = None
    run.events.close()
    return run


def left() -> set[str]:
    return {record.id for record in list_runs(Home.open())}


def test_runs_are_removed_by_name(adaptive: Any) -> None:
    first, second, third, fourth = (made(f"r{number}", number % 2) for number in range(4))
    done = adaptive("runs", "rm", first.id, "r0-", "r1-")
    assert done.code == 0 and done.out.count("removed ") == 2 and "KiB freed" in done.out
    assert left() == {third.id, fourth.id} and not first.directory.exists()
    newest = max(third.id, fourth.id)
    done = adaptive("runs", "rm", "last", "--json").json
    assert [entry["id"] for entry in done["removed"]] == [newest] and done["removed"][0]["bytes"] > 5000
    assert not list(Home.open().trash.iterdir()) and second.id not in left()


def test_a_run_that_is_alive_or_can_be_resumed_is_not_removed(adaptive: Any) -> None:
    running, resumable, gone = made("alive", None), made("stopped", 75, checkpoint=True), made("ended")
    killed = crashed(made("killed", None, checkpoint=True))
    done = adaptive("runs", "rm", "alive", "stopped", "killed", "ended")
    assert done.code == 6 and left() == {running.id, resumable.id, gone.id, killed.id}, "all or nothing"
    assert f"run {running.id} is running (process {os.getpid()} on " in done.err
    assert f"run {resumable.id} can be resumed: adaptive run --resume {resumable.id}" in done.err
    assert f"adaptive run --resume {killed.id}" in done.err and "--force" in done.err
    assert adaptive("runs", "rm", "alive", "--force").code == 6, "alive by its lock"
    assert adaptive("runs", "rm", "stopped", "killed", "ended", "--force").code == 0
    assert left() == {running.id}
    running.write_json("run.json", {"status": "failed"})  # whatever its record says
    assert adaptive("runs", "rm", "alive").code == 6
    running.finish("failed", 1, {}, report=False)


@pytest.mark.parametrize(("words", "code"), [(("rm",), 2), (("rm", ""), 2), (("rm", "nothing"), 3), (("rm", ".."), 3)])
def test_what_is_not_named_is_not_removed(words: tuple[str, ...], code: int, adaptive: Any) -> None:
    run = made("only")
    assert adaptive("runs", *words).code == code
    assert left() == {run.id}


def test_a_link_in_the_place_of_a_run_is_not_followed(adaptive: Any, tmp_path: Path) -> None:
    run = made("linked")
    os.rename(run.directory, tmp_path / "elsewhere")
    run.directory.symlink_to(tmp_path / "elsewhere")
    assert adaptive("runs", "rm", "linked").code == 7
    assert (tmp_path / "elsewhere" / "run.json").is_file() and run.directory.is_symlink()


def test_old_runs_are_collected(adaptive: Any) -> None:
    old, older, recent = made("old", days=40), made("older", 1, days=400), made("recent")
    resumable, running = made("stopped", 75, checkpoint=True, days=90), made("alive", None)
    killed = crashed(made("killed", None))
    long_ago = datetime.now().timestamp() - 50 * 86400
    for path in (killed.directory / "events.jsonl", killed.directory):
        os.utime(path, (long_ago, long_ago))
    planned = adaptive("runs", "gc", "--dry-run", "--json").json
    assert len(left()) == 6 and planned["dry_run"]
    done = adaptive("runs", "gc", "--json").json
    assert {entry["id"] for entry in done["removed"]} == {old.id, older.id, killed.id}
    assert done["removed"] == planned["removed"] and done["bytes"] == planned["bytes"] > 15000
    assert done["kept"] == [
        {"id": resumable.id, "reason": f"run {resumable.id} can be resumed: adaptive run --resume {resumable.id}"}
    ]
    assert left() == {recent.id, resumable.id, running.id}
    shown = adaptive("runs", "gc", "--keep", "0").out
    assert f"removed {recent.id}, " in shown and f"kept: run {running.id} is running" in shown
    assert "1 runs, " in shown and left() == {resumable.id, running.id}
    assert adaptive("runs", "gc", "--older-than", "soon").code == 2
    running.finish("failed", 1, {}, report=False)


def test_the_newest_are_kept_whatever_their_age(adaptive: Any) -> None:
    runs = [made(f"r{number}", days=days) for number, days in enumerate((50, 50, 50, 0))]
    newest = sorted((run.id for run in runs), reverse=True)
    adaptive("runs", "gc", "--keep", "2", "--older-than", "7d")
    assert {*newest[:2], runs[3].id} <= left() and len(left()) in (2, 3)
    adaptive("runs", "gc", "--keep", "1")
    assert left() == {newest[0]}


DAMAGES = [
    ("run.json", b'{"status": "fai', "list show report resume rm"),
    ("run.json", b"", "list show report resume rm"),
    ("run.json", b"[1]", "list show report resume rm"),
    ("run.json", b"\xff\xfe\x00", "list show report resume rm"),
    ("run.json", b'{"status": 5}', "list show report resume rm"),
    ("run.json", b'{"status": "failed", "options": []}', "list show report resume rm"),
    ("run.json", b'{"status": "failed", "options": {"seed": -1}}', "list show report resume rm"),
    ("run.json", b'{"status": "failed", "options": {"device": "tpu"}}', "list show report resume rm"),
    ("run.json", b'{"status": "failed", "resumed": NaN}', "list show report resume rm"),
    ("result.json", b"no", "show report"),
    ("result.json", b'{"errors": [{"lines": 3}]}', "show report"),
    ("result.json", b'{"errors": 1}', "show report"),
    ("models.json", b"[]", "show report"),
    ("models.json", b'{"model": "m@1"}', "show report"),
    ("argv.json", b"[1]", "show report"),
    ("sources.json", b'{"lr": 1}', "show report"),
    ("versions.json", b'{"torch": []}', "show report"),
    ("events.jsonl", b"no\n{}\n", "report"),
    ("events.jsonl", b"[]\n", "report"),
    ("config.yaml", b"a: [1", "show report"),
]


@pytest.mark.parametrize(("name", "text", "named"), DAMAGES)
def test_a_damaged_file_of_a_run_is_named(adaptive: Any, name: str, text: bytes, named: str) -> None:
    home = Home.open()
    Run.create(home, "whole").finish("failed", 1, {})
    run = Run.create(home, "x")
    run.finish("failed", 1, {})
    (run.directory / name).write_bytes(text)
    words = {
        "list": ["runs", "list"],
        "show": ["runs", "show", run.id],
        "report": ["runs", "report", run.id, "--open", "no"],
        "resume": ["run", "hello.py", "--resume", run.id],
        "rm": ["runs", "rm", run.id],
    }
    for command in named.split():
        done = adaptive(*words[command])
        assert done.code == 7, command
        assert f"run {run.id}: {name}" in done.errors[0]
    if name == "run.json":
        assert "whole" in adaptive("runs", "list").out
        assert adaptive("runs", "rm", "--force", run.id).code == 0
    assert adaptive("runs", "show", "whole").code == 0


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    os.truncate(path, 1 << 40)


def deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "\n")


@pytest.mark.parametrize("damage", [piped, endless, deep])
@pytest.mark.parametrize("name", ["run.json", "result.json", "events.jsonl"])
def test_a_file_that_no_run_writes_is_not_waited_for(adaptive: Any, name: str, damage: Callable[[Path], None]) -> None:
    run = Run.create(Home.open(), "x")
    run.finish("failed", 1, {})
    damage(run.directory / name)
    done = adaptive("runs", "report", run.id, "--open", "no")
    if name == "run.json" and damage is piped:
        assert done.code == 3  # a folder without a record is no run
    else:
        assert done.code == 7 and f"run {run.id}: {name}" in done.errors[0]


def test_a_last_event_that_was_cut_off_is_no_damage(adaptive: Any) -> None:
    run = Run.create(Home.open(), "x")
    run.finish("failed", 1, {})
    with (run.directory / "events.jsonl").open("a") as file:
        file.write('{"v": 1, "se')
    assert adaptive("runs", "report", run.id, "--open", "no").code == 0


def test_looking_needs_no_home_that_can_be_written(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adaptive("models", "add", "m", "builtin:tiny-lm")
    Run.create(Home.open(), "x").finish("failed", 1, {})
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    for words in (["models", "list"], ["models", "show", "m"], ["runs", "list"], ["runs", "show", "last"]):
        assert adaptive(*words).code == 0, words
    done = adaptive("models", "set", "m", "tp=1")
    assert done.code == 4 and str(Home(Path("../home").absolute()).path.name) in done.errors[0]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EMFILE])
def test_a_machine_that_takes_no_file_is_no_bug(adaptive: Any, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    adaptive("models", "add", "m", "builtin:tiny-lm")

    def replace(source: Any, target: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("os.replace", replace)
    for words in (["set", "m", "tokens_to_generate=5"], ["alias", "m", "good"]):
        done = adaptive("models", *words)
        assert done.code == 4
        assert os.strerror(reason) in done.errors[0] and "models/m/model.json" in done.errors[0]
