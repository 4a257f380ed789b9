"""How many of our files and functions stand on the way of a run.

    python benchmarks/path_length.py [--list] [--json FILE]

Counted are the functions of `harmony_core`, `cli` and `recipes` that are called, and their files, in real processes on
the CPU with the built-in model, which the home holds already. Comprehensions and lambdas belong to their function;
bodies of modules and classes, and what is called while a module is imported, do not count. The rows:

- `run sft`, to the spawn or micro-batch: all threads of the driver, from the command line to the moment at which the
  first `Spawn` or `MicroBatch` is given to a rank's connection, with what starts and watches the ranks meanwhile;
- `run sft --dry-run`: the same to the moment at which the spawn is planned, without ranks;
- `generate`: the driver's event loop, from the call on a model that has generated before until it returns: what six
  calls have in common, since the watch over the ranks ticks meanwhile now and then;
- `decode step`: a rank's engine thread, from one `next_step` of the leader to the one after, while one request decodes:
  the most frequent set of functions of 20 steps in a row, since a step that begins a page takes a few more.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("harmony_core", "cli", "recipes"))
PARTS = ("generate", "run sft --dry-run, to the spawn's plan", "run sft, to the spawn")
FOUND: dict[str, list[str]] = {}
"""Of each row the functions, as `file function`."""


class Recorder:
    """A profile function that keeps our functions that are called; `moment` is told of each call before it counts."""

    def __init__(self, moment: Callable[["Recorder", FrameType], None] = lambda *_: None) -> None:
        self.moment, self.called, self.importing = moment, set[CodeType](), Counter[int]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code, thread = frame.f_code, threading.get_ident()
        if event not in ("call", "return") or not code.co_filename.startswith(OURS):
            return
        if code.co_name == "<module>":
            self.importing[thread] += 1 if event == "call" else -1
        elif event == "call" and not self.importing[thread] and code.co_flags & 1 and code.co_name[0] != "<":
            self.moment(self, frame)
            self.called.add(code)

    def names(self) -> list[str]:
        return sorted(f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}" for code in self.called)


def until_sent(recorder: Recorder, frame: FrameType) -> None:
    """Keep what was called until a message is given to a connection, or a dry run has planned a spawn."""
    given = type(frame.f_locals.get("message")).__name__ if frame.f_code.co_name == "submit" else ""
    given = "DryRun" if "--dry-run" in sys.argv and frame.f_code.co_qualname == "LiveModel.__init__" else given
    rows = {"DryRun": PARTS[1], "Spawn": PARTS[2], "MicroBatch": "run sft, to the first micro-batch"}
    if given in rows:
        FOUND.setdefault(rows[given], recorder.names())


def steps_to(target: Path) -> Callable[[Recorder, FrameType], None]:
    """Write what the usual decode step of a long completion calls."""
    steps: list[tuple[str, ...]] = []

    def moment(recorder: Recorder, frame: FrameType) -> None:
        if frame.f_code.co_name == "next_step":
            names = tuple(recorder.names())
            recorder.called.clear()
            steps[:] = [*steps, names] if any(name.endswith("Runner.launch") for name in names) else []
            if len(steps) == 28:
                target.write_text(json.dumps(Counter(steps[8:]).most_common(1)[0][0]), encoding="utf-8")

    return moment


async def generate(folder: Path) -> None:
    from harmony_core.client import EngineOptions, HarmonyClient
    from harmony_core.home import Home
    from harmony_core.registry import Registry
    from harmony_core.text.threads import StringThread

    command = (sys.executable, __file__, "--rank", str(folder / "step"))
    options = EngineOptions(log_dir=folder, run_id="path", num_processes=1, device="cpu", command=command)
    async with HarmonyClient.start(options, Registry(Home.open()), lambda *_: None) as client:
        model = await client.model("builtin:tiny-lm").tokens_to_generate(64).spawn_inference("policy")
        model, thread = model.min_gen_len(64), StringThread([("user", "c a b")])
        await model.generate(thread)
        recorders = [Recorder() for _ in range(6)]
        for recorder in recorders:
            sys.setprofile(recorder)
            await model.generate(thread)
            sys.setprofile(None)
    FOUND["generate, on the driver"] = sorted(set.intersection(*(set(recorder.names()) for recorder in recorders)))
    FOUND["decode step, on the rank"] = json.loads((folder / "step").read_text(encoding="utf-8"))


def part(name: str, folder: Path) -> None:
    """One process of the measurement, with a rank of its own where there is one."""
    if name == "generate":
        asyncio.run(generate(folder))
    else:
        from harmony_core.cli import main as adaptive

        sys.argv = ["adaptive", *name.partition(",")[0].split(), "--device", "cpu", "--epochs", "0.05", "--quiet"]
        recorder = Recorder(until_sent)
        threading.setprofile(recorder)
        sys.setprofile(recorder)
        adaptive(sys.argv[1:])
        sys.setprofile(None)
    (folder / "found").write_text(json.dumps(FOUND), encoding="utf-8")


def rank(target: Path) -> None:
    from harmony_core.engine import process, worker  # noqa: F401  (so that no import is recorded)

    sys.setprofile(Recorder(steps_to(target)))
    process.run_rank(process._load_engine)


def measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"ADAPTIVE_HOME": f"{folder}/home", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for name in PARTS:  # the first leaves the built-in model in the home
            command = [sys.executable, __file__, "--part", name, folder]
            subprocess.run(command, check=True, timeout=240, env={**os.environ, **fixed}, stdout=subprocess.DEVNULL)
            FOUND.update(json.loads(Path(folder, "found").read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/path_length.py")
    parser.add_argument("--list", action="store_true", help="print the files and their functions too")
    parser.add_argument("--json", type=Path, help="where to write the functions of each row")
    asked = parser.parse_args()
    measure()
    print(f"| {'way':<38} | files | functions |\n|{'-' * 40}|------:|----------:|")
    for row, names in FOUND.items():
        print(f"| {row:<38} | {len({name.split()[0] for name in names}):>5} | {len(names):>9} |")
    for row, names in FOUND.items() if asked.list else ():
        print(f"\n{row}:")
        for file in sorted({name.split()[0] for name in names}):
            print(f"  {file}: {', '.join(name.split()[1] for name in names if name.split()[0] == file)}")
    if asked.json:
        asked.json.write_text(json.dumps(FOUND, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]))
    else:
        main()
