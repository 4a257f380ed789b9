"""A process that has loaded the command line and runs each case in a fork: under limits, watched, and counted after.

Reads lines of JSON, {"kind": ..., "seed": ..., "number": ..., "fresh": ...}; answers each with {"code": ..., "faults":
...}. `fresh` runs the command in a Python of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import hostile
import planted
import watch
from harmony_core.cli import main

from leftovers import wait_until

CODES = {*range(9), 75, 124, 129, 130, 143}
"""Of the README's table; 70 is a bug."""
CPU_SECONDS = {"gguf": 60}
"""Of one process, 10 unless it stands here: a GGUF file is read by libraries that take most of that to load."""
MEMORY = 1 << 30
PATIENCE = 240
"""Seconds in all, for what waits and does nothing: far more than a loaded machine needs."""
_PR_SET_CHILD_SUBREAPER = 36
_LOADED = (
    *("numpy", "adaptive_harmony.common", "harmony_core.recipe.execution"),
    *("harmony_core.registry.sources", "harmony_core.text.tokenizer_files", "harmony_core.client.spawning"),
    *(f"harmony_core.cli.{name}" for name in ("app", "config", "datasets", "models", "recipes", "runs")),
    "harmony_core.cli.run",
)


def faults_of(order: dict[str, Any], root: Path) -> dict[str, Any]:
    """Run one case. What it leaves behind is removed, unless something is wrong."""
    around = root / f"{order['kind']}-{order['number']}{'-fresh' * order.get('fresh', False)}"
    folder, record = around / "own", around / "record"
    (folder / "work").mkdir(parents=True)
    shutil.copytree(root / "home", folder / "home", symlinks=True)
    (folder / "tmp").mkdir()
    child = os.fork()
    if not child:
        os._exit(_run(order, folder, record))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = (around / "output").read_text("utf-8", "replace")
    faults = []
    if status not in CODES:
        faults.append(f"ended with {status}")
    faults += [f"said {word!r}" for word in ("Traceback (most", "panicked at", "a bug in", "\x1b[") if word in written]
    faults += record.read_text().splitlines() if record.exists() else ["was not watched"]
    faults += [f"left {path}" for path in around.rglob("canary")]
    faults += [f"wrote {name}" for name in os.listdir(around) if name not in ("own", "output", "record", "words")]
    faults += _survivors(order.get("patience", 20))
    words = (around / "words").read_text() if (around / "words").exists() else ""
    logs = list((folder / "tmp").glob("adaptive-bug-*"))
    if not faults:
        shutil.rmtree(around)
    bugs = "".join(log.read_text("utf-8", "replace")[-900:] for log in logs)
    return {"code": status, "faults": faults, "words": words, "output": written[:300] + bugs}


def _run(order: dict[str, Any], folder: Path, record: Path) -> int:
    """In the fork: make the input, take the limits, run the command."""
    try:
        os.setsid()
        os.chdir(folder / "work")
        kind, rng = order["kind"], random.Random(f"{order['seed']} {order['kind']} {order['number']}")
        made = planted.PLANTED.get(kind) or hostile.MAKERS[kind](rng, folder / "work")
        (folder.parent / "words").write_text(repr(made))
        os.environ |= {
            "ADAPTIVE_HOME": str(folder / "home"),
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
        }
        os.environ |= {watch.FOLDER: os.path.realpath(folder), watch.RECORD: str(record)}
        given = os.environ["PYTHONPATH"].split(os.pathsep)[2:]  # without this folder and the tests
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder.parents[1] / "watch"), *given])
        tempfile.tempdir = None
        _redirect(folder.parent / "output")
        signal.alarm(PATIENCE)
        seconds = order.get("seconds") or CPU_SECONDS.get(kind, 10)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if order.get("fresh"):
            os.execv(sys.executable, [sys.executable, "-P", "-m", "harmony_core.cli", *made])
        watch.watch()
        sys.argv = ["adaptive", *made] if isinstance(made, list) else []
        return (main() if isinstance(made, list) else made()) or 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _redirect(output: Path) -> None:
    for descriptor, path in ((0, os.devnull), (1, output), (2, output)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)


def _survivors(patience: float) -> list[str]:
    """What still runs: whatever outlives the process that started it becomes a child of this one."""
    found: list[str] = []

    def none_left() -> bool:
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return True
        return False

    if not wait_until(none_left, patience):
        for child in Path("/proc/thread-self/children").read_text().split():
            found.append(f"left running: {Path(f'/proc/{child}/cmdline').read_text()!r}")
            os.kill(int(child), signal.SIGKILL)
        wait_until(none_left, 20)
    return found


def serve(root: Path) -> None:
    """Answer until the input ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for name in _LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(faults_of(json.loads(line), root)), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
