"""Every command that the documentation shows is run as it stands there, in an empty folder and an empty home."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import small_models
from docs_blocks import ROOT, Block, all_blocks, blocks_in
from hub_server import serve

BLOCKS = all_blocks()
SESSIONS = [block for block in BLOCKS if block.kind == "console"]


def sessions(slow: bool) -> list[object]:
    chosen = [b for b in SESSIONS if ("slow" in b.notes) is slow and "elsewhere" not in b.notes]
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in chosen]


def environment(home: Path) -> dict[str, str]:
    """The tests' own, without what a user of this machine may have set for adaptive."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTIVE_")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("ADAPTIVE_TEST_")}
    return kept | {"ADAPTIVE_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def as_typed(command: str) -> tuple[list[str], dict[str, str]]:
    """The words of a command and the variables set before them; make works on this installation as it is."""
    words, variables = shlex.split(command), {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    program, *rest = words
    if program == "make":
        done = [flag for file in ("bin/adaptive", ".dev", ".slow") for flag in ("-o", f"{sys.prefix}/{file}")]
        return ["make", "-C", str(ROOT), "--no-print-directory", *done, f"VENV={sys.prefix}", "PIP=true", *rest], (
            variables
        )
    if program == "python":
        return [sys.executable, *rest], variables
    assert program == "adaptive", f"what is {program}?"
    return [str(Path(sys.executable).with_name("adaptive")), *rest], variables


def run(block: Block, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a session's commands in order beside its page's files; each must end with the expected exit code."""
    work, home = folder / "work", folder / "home"
    work.mkdir()
    for other in BLOCKS:
        if other.page == block.page and "file" in other.notes:
            (work / other.notes["file"]).write_text(other.body, encoding="utf-8")
    base = environment(home) | {"HF_HOME": str(folder / "hf")}
    results = []
    with serve(folder / "hub") as hub:
        if "hub" in block.notes:
            small_models.write_model(hub.root / block.notes["hub"])
            base |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        for command in block.commands:
            words, variables = as_typed(command)
            done = subprocess.run(words, cwd=work, env=base | variables, capture_output=True, text=True, timeout=840)
            shown = f"$ {command}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == int(block.notes.get("exit", 0)), shown
            assert "Traceback" not in done.stderr, shown
            results.append(done)
    return results


@pytest.mark.parametrize("block", sessions(slow=False))
def test_a_session_runs(block: Block, tmp_path: Path) -> None:
    results = run(block, tmp_path)
    if block.page == "README.md" and "adaptive run pong.py" in block.commands:
        trained, asked = results[-2:]
        assert "3 of 3 right" in trained.stdout and trained.stdout.splitlines()[-1] == "pong@1"
        assert asked.stdout == "tock\n"
    if "exit" in block.notes:
        assert results[-1].stderr.count("error: ") == 3, "each of the three mistakes that the page shows"


@pytest.mark.slow
@pytest.mark.parametrize("block", sessions(slow=True))
def test_an_expensive_session_runs(block: Block, tmp_path: Path) -> None:
    needed = block.notes.get("needs")
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    results = run(block, tmp_path)
    if block.commands == ["make quickstart"]:
        accuracy = re.search(r"^held-out accuracy: (\d\.\d\d)$", results[0].stdout, re.MULTILINE)
        assert accuracy and float(accuracy[1]) >= 0.9
    if "What is the capital of France?" in block.commands[-1]:
        assert "Paris" in results[-1].stdout


@pytest.mark.parametrize("block", [b for b in SESSIONS if "elsewhere" in b.notes], ids=lambda b: b.notes["elsewhere"])
def test_what_is_run_elsewhere_is_run_there(block: Block) -> None:
    text = (ROOT / block.notes["elsewhere"]).read_text("utf-8")
    for command in block.commands:
        program, target = command.split()
        if program == "python":  # by a test, with flags that make it short
            assert f'"{Path(target).name}"' in text and (ROOT / target).is_file(), command
        else:
            assert re.search(rf"^{program}\b.* {target}$", text, re.MULTILINE), command


def test_every_session_has_commands_that_can_be_run() -> None:
    assert len(SESSIONS) > 10
    for block in SESSIONS:
        assert block.commands, f"{block.page}:{block.line}"
        for command in block.commands:
            as_typed(command)


def test_commands_stand_in_sessions_only() -> None:
    """A fence of another kind would be shown and never run."""
    for block in BLOCKS:
        shown = [line for line in block.body.splitlines() if re.match(r"\$? ?(adaptive|make) \w", line)]
        assert block.kind == "console" or not shown, f"{block.page}:{block.line}"


def test_blocks_are_read_with_their_notes() -> None:
    text = "a\n\n<!-- slow, needs: x -->\n```console\n$ one\nout\n$ two\n```\n\n"
    text += "<!-- file: b.yaml -->\n```yaml\nk: 1\n```\n"
    session, file = blocks_in(text, "page")
    assert (session.line, session.commands, session.notes) == (3, ["one", "two"], {"slow": "", "needs": "x"})
    assert (file.kind, file.body, file.notes) == ("yaml", "k: 1\n", {"file": "b.yaml"})
