"""What may go wrong in a process that works on somebody else's file, and what is told of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harmony_core.confined import Limits, run
from harmony_core.errors import HarmonyError, ModelRefused, ResourceError, VerificationError
from leftovers import wait_until

ROOMY = Limits(memory=1 << 30, work=30, seconds=60)
ANSWER = "import json, sys; print(json.dumps({'ok': True, 'said': %s}))"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs a text as the module."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(text: str, limits: Limits = ROOMY) -> object:
        (tmp_path / "foreign_work.py").write_text(text)
        return run("foreign_work", [str(tmp_path)], limits, Path("some/file"), "reading it").get("said")

    return start


def test_its_libraries_start_one_thread_each(child, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """With a thread for each of 32 cores, importing numpy alone takes more than its 1 GiB."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "64")
    assert child("import numpy, os\n" + ANSWER % "len(os.listdir('/proc/self/task'))") == 1


def test_it_has_no_input_and_no_core_files(child) -> None:  # type: ignore[no-untyped-def]
    assert child(ANSWER % "sys.stdin.read()") == ""
    assert child("import resource\n" + ANSWER % "resource.getrlimit(resource.RLIMIT_CORE)[0]") == 0


@pytest.mark.parametrize(
    ("text", "limits", "error", "words"),
    [
        ("import time; time.sleep(600)", Limits(1 << 30, 30, 1.0), VerificationError, "takes longer than 1 s"),
        ("while True: pass", Limits(1 << 30, 1, 60), VerificationError, "more than 1 s of a processor's time"),
        ("x = bytearray(4 << 30)", ROOMY, VerificationError, "1.0 GiB of memory are not enough"),
        ("import os; os.abort()", ROOMY, VerificationError, r"broke down over it \(status -6\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ROOMY, ResourceError, "want of memory"),
        ("print('not JSON')", ROOMY, VerificationError, "broke down"),
        ("print('[1]')", ROOMY, VerificationError, "broke down"),
        (
            'print(\'{"error": {"type": "ModelRefused", "message": "no", "hint": "yes"}}\')',
            ROOMY,
            ModelRefused,
            "no",
        ),
    ],
)
def test_however_it_ends_is_a_plain_error(  # type: ignore[no-untyped-def]
    child, text: str, limits: Limits, error: type[HarmonyError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        child(text, limits)
    assert "Traceback" not in caught.value.message
    assert error is ModelRefused or caught.value.message.startswith("some/file: reading it")


def test_what_a_library_prints_as_it_breaks_is_not_shown(child) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(VerificationError) as caught:
        child("import sys; sys.stderr.write('thread panicked at src/lib.rs:1'); sys.exit(101)")
    assert "panicked" not in caught.value.message


def test_it_is_ended_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "foreign_work.py").write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    code = (
        "import sys; from pathlib import Path; from harmony_core.confined import Limits, run\n"
        "run('foreign_work', [sys.argv[1]], Limits(1 << 30, 30, 600.0), Path('x'), 'reading it')"
    )
    note = tmp_path / "pid"
    command = [sys.executable, "-c", code, str(note)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert wait_until(lambda: note.exists() and note.read_text() != "", 60)
    pid = int(note.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60)


def test_a_flood_of_output_is_not_kept(child) -> None:  # type: ignore[no-untyped-def]
    flood = "for _ in range(2000): print('x' * 10000)\n"
    assert child(flood + ANSWER % "1") == 1
