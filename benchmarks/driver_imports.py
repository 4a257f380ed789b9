"""What it would cost the driver to import transformers in a thread, in place of our own template renderer and readers.

    python benchmarks/driver_imports.py [--rounds N]

Each command runs in a fresh process, as it is and with a thread that imports `AutoConfig` and `AutoTokenizer` from the
first moment on and is waited for, since these commands would need them. Rows are medians of CPU seconds and peak memory
of the process itself. CPU time includes what the command would not have waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """\
import contextlib, io, json, resource, sys, threading

def load():
    from transformers import AutoConfig, AutoTokenizer

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

thread = threading.Thread(target=load if sys.argv[1] == "import" else int)
started = used()[0]
thread.start()
if sys.argv[2:]:
    from importlib.metadata import entry_points
    (script,) = entry_points(group="console_scripts", name="adaptive")
    with contextlib.redirect_stdout(io.StringIO()):
        assert script.load()(sys.argv[2:]) == 0
thread.join()
seconds, mebibytes = used()
print(json.dumps([seconds - started, mebibytes, "torch" in sys.modules]))
"""
COMMANDS = {
    "the import alone": [],
    "models add": ["models", "add", "tiny", "builtin:tiny-lm"],
    "run sft --dry-run": ["run", "sft", "--dry-run", "--device", "cpu", "--quiet"],
}


def measured(kind: str, words: list[str]) -> tuple[float, float, bool]:
    """CPU seconds, peak MiB and whether torch was loaded, of one process with a new home."""
    with tempfile.TemporaryDirectory() as home:
        variables = {**os.environ, "ADAPTIVE_HOME": home, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", "-c", PROGRAM, kind, *words]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True)
    seconds, mebibytes, torch = json.loads(done.stdout.splitlines()[-1])
    return seconds, mebibytes, torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for kind in ("as it is", "import"):  # once, so that every file has been read
        measured(kind, COMMANDS["models add"])
    for name, words in COMMANDS.items():
        found = {kind: [] for kind in ("as it is", "import")}
        for _ in range(rounds):
            for kind, rows in found.items():
                rows.append(measured(kind, words))
        for kind, rows in found.items():
            seconds, mebibytes = (statistics.median(row[place] for row in rows) for place in (0, 1))
            torch = ", torch loaded" if rows[0][2] else ""
            print(f"{name:18} {kind:9} {seconds:6.2f} s of CPU {mebibytes:6.0f} MiB{torch}", flush=True)


if __name__ == "__main__":
    main()
