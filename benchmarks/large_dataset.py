"""A JSONL file of many rows, from the shell prompt to the first training step of `adaptive run sft`.

    python benchmarks/large_dataset.py [--rows N] [--json FILE]

The file is written first, 100 to 200 bytes a row, each with a column beside its messages. The run is one fresh process
in an empty home, clocked from outside; it loads, checks and shuffles all rows and ends after one step of 64. Memory is
the largest resident set of any of its processes (the kernel's figure for children, as `/usr/bin/time -v` reports it).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS, MEBIBYTES = 60, 1024
"""What a million rows may take."""


def write_rows(path: Path, count: int) -> None:
    """Five letters to sort in each row."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5))
            turns = [{"role": "user", "content": word}, {"role": "assistant", "content": "".join(sorted(word))}]
            file.write(json.dumps({"messages": turns, "id": row}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, arguments.rows)
        program = str(Path(sys.executable).with_name("adaptive"))
        settings = ["--epochs", f"{64 / arguments.rows:.12f}", "--samples-per-batch", "64", "--save-as", "null"]
        command = [program, "run", "sft", "--dataset", str(file), *settings, "--max-batch-size", "1024"]
        environment = os.environ | {"ADAPTIVE_HOME": f"{folder}/home", "CUDA_VISIBLE_DEVICES": ""}
        began = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"rows": arguments.rows, "seconds": round(seconds, 1), "mebibytes": used.ru_maxrss // 1024}
    found |= {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(seconds > SECONDS or found["mebibytes"] > MEBIBYTES)


if __name__ == "__main__":
    sys.exit(main())
