"""What only a process shows: its imports, its signals, its streams."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "accelerate", "peft"}
LIGHT_HELP = {*HEAVY, "pydantic", "yaml", "rich.markdown", "numpy"}

WAITS = """
import asyncio, time
from harmony_core.recipe.context import RecipeContext
from harmony_core.recipe import InputConfig, recipe_main

class Config(InputConfig):
    block: bool = False
    thread: bool = False
    stubborn: bool = False

@recipe_main
async def main(config: Config, ctx: RecipeContext):
    print("go", flush=True)
    try:
        if config.block:
            time.sleep(60)
        if config.thread:
            await asyncio.to_thread(time.sleep, 60)
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        if not config.stubborn:
            raise
        await asyncio.sleep(60)
    finally:
        print("finally", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "harmony_core.cli", *words]


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], LIGHT_HELP),
        (["--version"], {*LIGHT_HELP, "typer"}),
        (["run", "--help"], HEAVY),
        (["run", "sft", "--help"], HEAVY),
        (["run", "sft", "--dry-run"], HEAVY),
        (["config", "show", "sft"], HEAVY),
        (["models", "list"], HEAVY),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_imports(folder: Path, words: list[str], forbidden: set[str]) -> None:
    command = [sys.executable, "-X", "importtime", *_command(*words)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "harmony_core" in loaded
    assert not {name for name in loaded if name in forbidden or name.partition(".")[0] in forbidden & HEAVY}


@pytest.mark.parametrize(
    ("words", "sent", "code"),
    [
        ([], [signal.SIGINT], 130),
        ([], [signal.SIGTERM], 143),
        ([], [signal.SIGHUP], 129),
        (["--block"], [signal.SIGINT], 130),
        (["--block"], [signal.SIGINT, signal.SIGINT], 130),
        (["--stubborn"], [signal.SIGINT, signal.SIGINT], 130),
        pytest.param(["--thread"], [signal.SIGINT], 130, marks=pytest.mark.slow),  # ten seconds by construction
    ],
)
def test_signals(folder: Path, words: list[str], sent: list[signal.Signals], code: int, no_leftovers: Path) -> None:
    command = _command("run", "waits.py", "--device", "cpu", *words)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "go\n"
        err = ""
        for number, each in enumerate(sent):
            while number and "stopping" not in err:  # the first signal is heard
                err += process.stderr.readline()
            process.send_signal(each)
        out, rest = process.communicate(timeout=30)
    err += rest
    assert process.returncode == code
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 5
    assert ("ended: asked twice" in err) is (len(sent) == 2)
    if len(sent) == 1:
        assert out == "finally\n"
    assert list(no_leftovers.iterdir()) == []
    (record,) = (folder / "home" / "runs").iterdir()
    assert json.loads((record / "run.json").read_text())["status"] == "stopped"
    assert json.loads((record / "result.json").read_text())["exit"] == code


def test_ascii_streams_and_forced_colour(folder: Path) -> None:
    (folder / "c.yaml").write_text("nöte: ünï\n", encoding="utf-8")
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "FORCE_COLOR": "1",
        "GITHUB_ACTIONS": "true",
        "LC_ALL": "C",
    }
    command = _command("run", "waits.py", "-c", "c.yaml", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == json.loads(done.stdout)["exit"] == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_gets_a_bar_and_its_cursor_back(folder: Path) -> None:
    (folder / "bar.py").write_text(
        "from harmony_core.recipe.context import RecipeContext\nfrom harmony_core.recipe import recipe_main\n"
        "@recipe_main\nasync def main(ctx: RecipeContext):\n    stage = ctx.job.stage_notifier('Working')\n"
        "    for done in range(4):\n        stage.report_progress(3, done)\n        print('row', done)\n"
    )
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")} | {"TERM": "xterm"}
    command = _command("run", "bar.py", "--dry-run")
    with subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the terminal's other end is closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "Working" in text
    assert "3/3" in text
    assert "row 3" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
