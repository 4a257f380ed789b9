"""A run's directory: what it holds, who holds its lock, and what it never holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harmony_core.errors import NotFoundError, ResourceError
from harmony_core.home import Home
from harmony_core.redaction import MASK, Redactor
from harmony_core.runs.records import find_run, list_runs
from harmony_core.runs.run import Run


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


def test_a_run_from_start_to_end(home: Home) -> None:
    run = Run.create(home, "My Recipe.py", ["run", "x.py", "--lr", "1"])
    assert "-my-recipe-py-" in run.id and run.directory.stat().st_mode & 0o777 == 0o700
    assert [record.status for record in list_runs(home)] == ["running"]
    run.events.write("step", {"loss": 1.5}, rank=1)
    run.finish("succeeded", 0, {"ok": True})
    run.finish("failed", 1, {"ok": False})
    (record,) = list_runs(home)
    assert (record.status, record.data["exit"]) == ("succeeded", 0)
    assert json.loads((run.directory / "result.json").read_text()) == {"ok": True}
    assert json.loads((run.directory / "argv.json").read_text()) == ["run", "x.py", "--lr", "1"]
    assert json.loads((run.directory / "versions.json").read_text())["torch"]
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [event["type"] for event in events] == ["run.start", "step", "run.end"]
    assert [event["seq"] for event in events] == [0, 1, 2]
    assert events[1]["data"] == {"loss": 1.5}
    assert events[1]["rank"] == 1
    assert all(event["v"] == 1 and event["run"] == run.id and event["ts"].endswith("Z") for event in events)


def test_events_from_many_threads_are_whole_lines_in_order(home: Home) -> None:
    run = Run.create(home)
    heard: list[int] = []
    run.events.listen(lambda event: heard.append(event["seq"]))
    threads = [
        threading.Thread(target=lambda: [run.events.write("t", {"text": "x" * 500}) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.finish("succeeded", 0, {})
    run.events.write("late", {})
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in events] == list(range(402))
    assert set(range(1, 401)) < set(heard)


def test_a_killed_run_reads_as_crashed(home: Home) -> None:
    code = (
        "import os, sys; from harmony_core.home import Home; from harmony_core.runs.run import Run;"
        "run = Run.create(Home.open(sys.argv[1]), 'killed'); print(run.id, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        assert find_run(home, run_id).status == "running"
        process.kill()
        process.wait()
    assert find_run(home, run_id).status == "crashed"


def test_runs_are_found_by_a_part_of_their_id(home: Home) -> None:
    first, second = Run.create(home, "first"), Run.create(home, "second")
    assert find_run(home, "first").id == first.id
    assert find_run(home, "last").id == max(first.id, second.id)
    with pytest.raises(NotFoundError, match="2 runs match"):
        find_run(home, "-")
    with pytest.raises(NotFoundError, match="there is no run 'third'"):
        find_run(home, "third")
    (home.runs / "rubbish").mkdir()
    assert len(list_runs(home)) == 2
    first.finish("failed", 1, {})
    second.finish("failed", 1, {})


def test_a_run_that_is_left_by_an_exception_has_an_end(home: Home) -> None:
    with pytest.raises(ResourceError), Run.opened(home, "x", []) as run:
        raise ResourceError("no")
    assert (find_run(home, run.id).status, find_run(home, run.id).data["exit"]) == ("failed", 4)


def test_a_temporary_run_leaves_nothing(home: Home) -> None:
    with Run.temporary("dry-run") as run:
        run.events.write("x", {})
        assert (run.directory / "events.jsonl").is_file()
        run.finish("planned", 0, {})
    assert not run.directory.exists()
    assert list_runs(home) == []


def test_an_unwritable_home_is_an_error_of_the_environment(home: Home) -> None:
    home.runs.rmdir()
    home.runs.write_text("a file")
    with pytest.raises(ResourceError, match="cannot write a run"):
        Run.create(home)


def test_secrets_reach_no_file_of_a_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = [f"canary{number:02d}secret" for number in range(6)]
    monkeypatch.setenv("WANDB_API_KEY", canaries[0])
    shaped = ["hf_" + "a1" * 17, "sk-" + "b2" * 12, "ghp_" + "c3" * 18]
    argv = ["run", "--api-key", canaries[1], "--set", f"x.token={canaries[2]}", f"--hub-token={canaries[3]}", shaped[0]]
    run = Run.create(home, "x", argv, Redactor.from_environment(os.environ).knowing({"secret": canaries[4]}))
    run.events.write("log", {"text": f"{canaries[0]} {canaries[4]} {' '.join(shaped)} https://me:{canaries[5]}@x.org"})
    run.finish("failed", 1, {"errors": [f"boom {canaries[0]} postgres://u:plainword@h"]})
    text = "".join(path.read_text() for path in run.directory.rglob("*") if path.is_file())
    for canary in [*canaries, *shaped, "plainword"]:
        assert canary not in text
    assert MASK in text


@pytest.mark.parametrize("word", ["status", "running", "succeeded", "x", "run.start", "directory"])
def test_a_secret_that_is_a_word_of_ours_destroys_no_record(home: Home, word: str) -> None:
    run = Run.create(home, "x", ["run"], Redactor([word]))
    run.events.write("told", {"status": word, "text": f"the {word}"})
    run.finish("succeeded", 0, {"ok": True, "status": "succeeded", "result": {"status": word}})
    (record,) = list_runs(home)
    assert (record.status, record.data["name"], record.id) == ("succeeded", "x", run.id)
    record.require("run.json", "result.json", "argv.json", "events.jsonl")
    result = json.loads((run.directory / "result.json").read_text())
    assert result == {"ok": True, "status": "succeeded", "result": {"status": MASK}}
    told = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [event["type"] for event in told] == ["run.start", "told", "run.end"]
    assert told[1]["data"] == {"status": MASK, "text": f"the {word if len(word) < 8 else MASK}"}


def test_a_resumed_run_goes_on_in_its_directory(home: Home) -> None:
    run = Run.create(home, "r", ["run", "x.py"])
    run.note(recipe="x.py")
    run.finish("stopped", 75, {"ok": False})
    with (run.directory / "events.jsonl").open("a") as file:
        file.write('{"cut off')
    for turn in (1, 2):
        again = Run.reopen(find_run(home, run.id), ["run", "--resume"])
        assert again.id == run.id and again.log_dir == run.directory / "logs" / f"resumed-{turn}"
        assert not (run.directory / "result.json").exists()
        assert find_run(home, "last").status == "running"
        again.finish("succeeded", 0, {"ok": True})
    record = find_run(home, "last")
    assert (record.status, record.data["exit"], record.data["recipe"]) == ("succeeded", 0, "x.py")
    assert json.loads((run.directory / "argv.json").read_text()) == ["run", "x.py"]
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    types = ["run.start", "run.end", None, "run.resume", "run.end", "run.resume", "run.end"]
    assert [None if line == '{"cut off' else json.loads(line)["type"] for line in lines] == types
    assert [json.loads(line)["seq"] for line in lines if line != '{"cut off'] == [0, 1, 3, 4, 5, 6]


def test_the_last_run_is_the_last_whatever_the_local_time(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for zone in ("Etc/GMT-12", "Etc/GMT+12", "UTC", "Etc/GMT-12"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        made += [Run.create(home, name) for name in ("b", "a")]
    monkeypatch.delenv("TZ")
    time.tzset()
    assert [record.id for record in reversed(list_runs(home))] == [run.id for run in made]
    assert find_run(home, "last").id == made[-1].id
    for run in made:
        run.finish("failed", 1, {})


def test_an_event_that_cannot_be_written_ends_nothing(home: Home) -> None:
    run = Run.create(home, "x")
    run.events.write("odd", {"text": "a lone \ud800 surrogate", "number": float("inf"), "object": object()})
    kept = run.events._file
    run.events._file = open("/dev/full", "w")  # noqa: SIM115 - the log closes it
    run.events.write("lost", {"text": "x"})
    run.events.close()
    run.events._file = kept
    run.finish("failed", 1, {})
    find_run(home, "last").require("events.jsonl")
