"""Readers that leave, streams that are closed, terminals that go: a command goes on to its end, and its prints stay."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harmony_core.cli.output import Streams, _Lasting

from leftovers import running, wait_until

ROWS = 50

RECIPE = f"""
import asyncio, logging, subprocess, sys
from pathlib import Path
from rich.console import Console
from harmony_core.recipe.context import RecipeContext
from harmony_core.recipe import InputConfig, recipe_main

class Config(InputConfig):
    wait: bool = False

out, err = sys.stdout, sys.stderr
logging.basicConfig()
print("imported")

@recipe_main
async def main(config: Config, ctx: RecipeContext):
    console, stage = Console(), ctx.job.stage_notifier("Rows")
    for row in range({ROWS}):
        stage.report_progress({ROWS}, row)
        print("print", row)
        sys.stdout.write(f"write {{row}}\\n")
        sys.stdout.buffer.write(f"buffer {{row}}\\n".encode())
        sys.__stdout__.write(f"dunder {{row}}\\n")
        out.write(f"early {{row}}\\n")
        console.print("rich", row)
        print("stderr", row, file=sys.stderr)
        err.write(f"early stderr {{row}}\\n")
        logging.warning("logged %d", row)
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print("no such character: \\ud800", end="")
    Path("end").touch()
    while config.wait and not Path("closed").exists():
        await asyncio.sleep(0.01)
    return "the result"
"""
ON_STDOUT = ("print", "write", "buffer", "dunder", "early", "rich")
ON_STDERR = ("stderr", "early stderr", "WARNING:root:logged")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "prints.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line: str) -> tuple[list[int], str]:
    """Run a pipeline in which `adaptive` is the command; the exit codes of its parts, and what it shows."""
    adaptive = f'adaptive() {{ {shlex.quote(sys.executable)} -m harmony_core.cli "$@"; }}'
    script = f'{adaptive}\n{line}\necho "${{PIPESTATUS[@]}}" >codes'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    return [int(code) for code in Path("codes").read_text().split()], done.stdout + done.stderr


@pytest.mark.parametrize(
    "redirection",
    [
        "--json | true",
        "--json 2>&-",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("| head -1", "2>&1 | head -1", ">&-", ">&- 2>&-")),
    ],
)
def test_printing_may_end_and_the_run_goes_on(folder: Path, redirection: str) -> None:
    codes, shown = shell(f"adaptive run prints.py --dry-run {redirection}")
    assert codes[0] == 0, shown
    assert (folder / "end").exists()
    assert "Broken pipe" not in shown and "Traceback" not in shown


def test_what_a_run_prints_is_kept(folder: Path) -> None:
    codes, shown = shell("adaptive run prints.py 2>&1 | head -1")
    assert (codes, shown) == ([0, 0], "imported\n")
    (run,) = (folder / "home" / "runs").iterdir()
    kept = {name: (run / "logs" / f"{name}.log").read_text().splitlines() for name in ("stdout", "stderr")}
    for name, ways in (("stdout", ON_STDOUT), ("stderr", ON_STDERR)):
        for way in ways:
            assert [line for line in kept[name] if re.fullmatch(rf"{way} \d+", line)] == [
                f"{way} {row}" for row in range(ROWS)
            ]
    assert (kept["stdout"][0], kept["stdout"][-1]) == ("imported", "no such character: \\ud800")
    assert json.loads((run / "result.json").read_text())["result"] == "the result"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("models list 2>/dev/null | true", 0),
        ("models show none >&- 2>&-", 3),
        ("recipes show sft >/dev/full", 4),
        pytest.param("recipes show sft | true", 0, marks=pytest.mark.slow),
        pytest.param("--help >&- 2>&-", 0, marks=pytest.mark.slow),
        pytest.param("--version >&-", 0, marks=pytest.mark.slow),
    ],
)
def test_other_commands_end_as_they_would_have(folder: Path, line: str, code: int) -> None:
    codes, shown = shell(f"adaptive {line}")
    assert (codes[0], shown) == (code, "error: stdout: No space left on device\n" if "full" in line else "")


def in_terminal(folder: Path, line: str, seen: Callable[[str], bool], goes_on: bool) -> dict[str, Any]:
    """Type a line into a shell on a terminal, close that when `seen(what it shows)`, and return the run's record.

    The recipe waits until the terminal is closed, and ends only if it `goes_on`.
    """
    variables = {"TERM": "xterm", "IN_TERMINAL": str(folder)}
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")} | variables
    process, master = pty.fork()
    if process == 0:  # pragma: no cover - another process
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    os.write(master, f"{line}\n".encode())
    shown = b""

    def read() -> bool:
        nonlocal shown
        if select.select([master], [], [], 0)[0]:
            shown += os.read(master, 65536)
        return seen(shown.decode("utf-8", "replace"))

    assert wait_until(read, 120), shown[-1000:]
    os.close(master)
    if "trap" not in line:  # a shell that ignores it as well waits for what runs in it
        os.waitpid(process, 0)  # the shell has told what runs in it
    if goes_on:
        (folder / "closed").touch()
    if "trap" in line:
        os.waitpid(process, 0)
    assert wait_until(lambda: not running("IN_TERMINAL", str(folder)), 40)
    (run,) = (folder / "home" / "runs").iterdir()
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record | {"logs": run / "logs"}


def command(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "harmony_core.cli", *words])


@pytest.mark.parametrize(
    ("begin", "moment", "expected"),
    [
        ("", "end", ("stopped", 129)),
        ("nohup ", "end", ("succeeded", 0)),
        pytest.param("", "started", ("stopped", 129), marks=pytest.mark.slow),
        pytest.param("trap '' HUP; ", "end", ("succeeded", 0), marks=pytest.mark.slow),
    ],
)
def test_a_terminal_that_is_closed(folder: Path, begin: str, moment: str, expected: tuple[str, int]) -> None:
    def seen(shown: str) -> bool:
        return "run 20" in shown.replace("adaptive run", "") if moment == "started" else (folder / "end").exists()

    found = in_terminal(folder, begin + command("run", "prints.py", "--wait"), seen, goes_on=expected[1] == 0)
    assert (found["status"], found["exit"]) == expected
    if moment == "end":
        assert f"print {ROWS - 1}\n" in (found["logs"] / "stdout.log").read_text()
        assert "\x1b[?25l" not in (found["logs"] / "stderr.log").read_text(), "the progress bar is not kept"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGHUP, 129),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_signals_before_a_recipe_runs(folder: Path, number: int, code: int) -> None:
    (folder / "slow.py").write_text(
        f"import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n{RECIPE}"
    )
    words = [sys.executable, "-m", "harmony_core.cli", "run", "slow.py", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: (folder / "importing").exists(), 60)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(out)["exit"], err) == (code, code, "")


def test_a_pipe_that_is_full_and_not_blocking_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    data, shown = os.urandom(1 << 20), b""

    def drain() -> None:
        nonlocal shown
        while part := os.read(read, 65536):
            shown += part

    reader = threading.Thread(target=drain)
    reader.start()
    assert _Lasting(write, None, Streams()).write(data) == len(data)
    os.close(write)
    reader.join()
    os.close(read)
    assert shown == data


def test_streams_are_left_alone_unless_the_process_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    streams = Streams()
    assert sys.stdout is before and streams.for_prints_on_stderr() is sys.stderr
