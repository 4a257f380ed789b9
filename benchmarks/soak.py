"""A GRPO run under random faults, resumed after each: it must end with the weights of a run that nothing disturbs.

    python benchmarks/soak.py [--minutes 30] [--ranks 2] [--seed 1] [--steps N] [--json FILE]

First `recipes/soaked.py` runs to its end in one go. It cancels requests of its own, the same in every run. Then it
runs from one random fault to the next, start-up included, and is resumed each time; when it has ended it is begun anew
until the time is over and there was a fault. Faults: SIGKILL or SIGTERM to the driver or to a rank, a rank that is
stopped, a full disk. The disk is a small tmpfs in a mount namespace of the script's own: nothing is left of it.

The exit code is 1 unless all saved weights are equal byte for byte, every run ends with the exit code of its fault,
no process or socket is left, and memory, descriptors and threads of the undisturbed run's processes stay flat from its
first step on: the median over the last quarter of the time against that over the first, without the first tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path

import psutil
from report import ROOT, Report, Row, machine

from harmony_core.home import Home
from harmony_core.launch.processes import processes_with
from harmony_core.registry import Registry
from harmony_core.rpc.platform import state

RECIPE = ROOT / "benchmarks" / "recipes" / "soaked.py"
MARK = "ADAPTIVE_SOAK"
FAULTS = {
    "SIGKILL the driver": [-signal.SIGKILL],
    "SIGTERM the driver": [75, 143, -signal.SIGTERM],
    "SIGKILL a rank": [5],
    "SIGTERM a rank": [5],
    "SIGSTOP a rank": [124],
    "fill the disk": [4],
}
"""How a run may end after each, besides well: it may have been about to end. While Python starts, nobody heeds SIGTERM
yet; without a checkpoint there is nothing to resume."""
DISK_BYTES = 512 << 20
SILENCE_SECONDS = 30
"""More than a busy machine keeps a living rank waiting."""
PATIENCE_SECONDS = 120
"""Most time from a fault to the end of the run."""
GROWTH = {"memory, MiB": 16.0, "descriptors": 2.0, "threads": 1.0}
"""By how much a process may hold more in the last quarter of its time than in the first."""


class Soak:
    """Where it happens, what runs, and what was seen."""

    def __init__(self, folder: Path, options: argparse.Namespace, report: Report) -> None:
        self.home, self.sockets, self.logs = (folder / name for name in ("home", "sockets", "logs"))
        for path in (self.home, self.sockets, self.logs):
            path.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", self.home], check=True)
        self.options, self.report, self.chance = options, report, random.Random(options.seed)
        self.mark = str(os.getpid())
        self.samples: dict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []
        self.number = 0
        self.starting = self.stepping = 0.0

    @property
    def faults(self) -> int:
        """How many there were, without those that came too late."""
        return sum(n for end, n in self.ends.items() if not end.startswith("nothing") and not end.endswith(": 0"))

    def start(self, key: str, resumed: str | None) -> None:
        """Begin, or go on with, the run that saves under `key`."""
        self.number += 1
        self.stderr = self.logs / f"stderr-{self.number}"
        words = ["run", str(RECIPE), "--steps", str(self.options.steps), "--save-as", key, "--deterministic"]
        words += ["--num-processes", str(self.options.ranks), "--device", "cpu", "--fault-grace", "10s"]
        words += ["--silence-timeout", f"{SILENCE_SECONDS}s", "--save-wait", "60s"]
        words += ["--resume", resumed] if resumed else []
        variables = {"ADAPTIVE_HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.sockets), MARK: self.mark}
        command = [sys.executable, "-P", "-m", "harmony_core.cli", *words]
        with self.stderr.open("wb") as stderr:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
            self.driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)

    def processes(self) -> dict[str, psutil.Process]:
        """What is alive, by what it is: rank 0, or the module that it runs."""
        found = {}
        for pid in processes_with(MARK, self.mark):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                words = process.cmdline()
                role = words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else str(pid)
                if role == "process":
                    role = f"rank {process.environ().get('RANK', 0)}"
                if state(pid) not in ("", "Z", "X"):
                    found[role] = process
        return found

    def sample(self, over: threading.Event) -> None:
        """Once a second until it is over, what each process holds."""
        while not over.wait(1):
            for role, process in self.processes().items():
                with contextlib.suppress(psutil.Error):
                    held = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
                    self.samples[process.pid, role].append(held)

    def problem(self, text: str) -> None:
        self.problems.append(f"run {self.number}: {text}")
        self.report.say(f"PROBLEM in {self.problems[-1]}\n{self.stderr.read_text(errors='replace')[-3000:]}")

    def await_step(self) -> None:
        """Until the present run has taken a step or has ended."""
        while self.driver.poll() is None:
            text = self.stderr.read_text(errors="replace")
            if " goes on at " in text or "step 1 " in text:
                return
            time.sleep(0.05)

    def ended(self, fault: str, patience: float = PATIENCE_SECONDS) -> int:
        """Wait for the end, which must have the fault's exit code and leave no process. Returns the exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(patience)
        if self.driver.poll() is None:
            self.problem(f"{fault}: not ended after {patience:.0f} s")
            self.driver.kill()
        code = self.driver.wait()
        if code not in (right := [0, *FAULTS.get(fault, [])]):
            self.problem(f"{fault}: exit code {code} is none of {right}")
        deadline = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            self.problem(f"{fault}: left behind: {sorted(left)}")
        self.ends[f"{fault}: {code}"] += 1
        self.report.say(f"run {self.number}: {fault}: exit code {code}")
        return code

    def signal_rank(self, number: int) -> None:
        """Signal a random rank, as soon as there is one."""
        role = f"rank {self.chance.randrange(self.options.ranks)}"
        while self.driver.poll() is None:
            if process := self.processes().get(role):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
                return
            time.sleep(0.05)

    def fill_disk(self) -> None:
        """For up to 40 s. A save waits for room; a checkpoint does not, and the run ends."""
        filler = self.home / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(self.chance.random() * 40)
        filler.unlink()

    def disturb(self, deadline: float) -> str:
        """Wait a while, half of the times from the start on, else from a step on; do something. What was done."""
        begun = self.chance.random() < 0.5
        if begun:
            self.await_step()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(self.chance.random() * (self.stepping / 8 if begun else self.starting))
        if self.driver.poll() is not None or (time.monotonic() > deadline and self.faults):
            return "nothing"
        fault = self.chance.choice(list(FAULTS))
        if fault == "fill the disk":
            self.fill_disk()
        elif fault.endswith("driver"):
            self.driver.send_signal(signal.Signals[fault.split()[0]])
        else:
            if fault == "SIGSTOP a rank":  # in its start it would have minutes
                self.await_step()
            self.signal_rank(signal.Signals[fault.split()[0]])
        return fault

    def calm(self) -> None:
        """The run that nothing disturbs."""
        started = time.monotonic()
        self.start("calm", None)
        self.await_step()
        self.starting = time.monotonic() - started
        self.samples.clear()
        self.ended("nothing", 7200)
        self.stepping = time.monotonic() - started - self.starting

    def given_up(self) -> float:
        """Requests that the recipe has cancelled in the only run that there is."""
        (events,) = (self.home / "runs").glob("*/events.jsonl")
        found = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
        return sum(float(event["data"]["metrics"]["given_up"]) for event in found if event["type"] == "metrics")

    def round(self, key: str, deadline: float) -> None:
        """A run from its beginning to its end, resumed after each fault; anew where it had no checkpoint yet."""
        before = set((self.home / "runs").iterdir())
        resumed, code, fault = None, 1, ""
        while code != 0 and fault != "nothing":
            self.start(key, resumed)
            fault = self.disturb(deadline)
            while fault == "fill the disk" and self.driver.poll() is None:  # there is room again
                self.ends[f"{fault}: went on"] += 1
                fault = self.disturb(deadline)
            code = self.ended(fault, 7200 if fault == "nothing" else PATIENCE_SECONDS)
            made = sorted(set((self.home / "runs").iterdir()) - before)
            resumed = next((run.name for run in reversed(made) if any(run.glob("checkpoints/checkpoint-*"))), None)

    def saved(self, key: str) -> set[bytes]:
        """The weights of all versions of a key."""
        registry = Registry(Home.open(self.home))
        folders = [registry.resolve(f"{key}@{number}").path for number in registry.versions(key)]
        return {path.read_bytes() for folder in folders for path in folder.glob("*.safetensors")}

    def check(self, rounds: int) -> None:
        """What every round saved, on the way and at the end, against what the undisturbed run saved; what is left."""
        for number in range(1, rounds + 1):
            for part in ("", "-part"):
                if self.saved(f"round-{number}{part}") != self.saved(f"calm{part}"):
                    self.problem(f"round {number}{part}: the weights are not those of the undisturbed run")
        if left := sorted(path.name for path in self.sockets.iterdir()):
            self.problem(f"left in the runtime directory: {left}")


def growth(role: str, samples: list[tuple[float, ...]]) -> list[Row]:
    """By how much the last quarter's medians are above the first one's, without the first tenth."""
    samples = samples[len(samples) // 10 :]
    size, rows = max(1, len(samples) // 4), []
    for (name, most), values in zip(GROWTH.items(), zip(*samples, strict=True), strict=True):
        first, last = statistics.median(values[:size]), statistics.median(values[-size:])
        note = f"{first:.0f} to {last:.0f}, at most {max(values):.0f}; {len(values)} samples"
        rows.append(Row(f"{role}: {name}, growth", last - first, must=most, most=True, note=note))
    return rows


def in_own_namespace() -> None:
    """Go on in a mount namespace of its own, where a tmpfs may be mounted."""
    if os.environ.get(MARK) != "inside":
        os.environ[MARK] = "inside"
        rights = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
        os.execvp("unshare", ["unshare", *rights, "--mount", sys.executable, *sys.argv])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--steps", type=int, help="of the run (default: 6 a minute)")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / f"{day}-soak.json")
    options = parser.parse_args()
    options.steps = options.steps or max(1, round(6 * options.minutes))
    in_own_namespace()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is below "finally" is done
    deadline, over, rounds = time.monotonic() + 60 * options.minutes, threading.Event(), 0
    described = machine() | {"load_before": round(os.getloadavg()[0], 1), "seed": options.seed, "steps": options.steps}
    report = Report("soak", options.json, described)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options, report)
        sampler = threading.Thread(target=soak.sample, args=(over,))
        try:
            sampler.start()
            soak.calm()
            given_up = soak.given_up()
            watched = {role: samples for (_, role), samples in soak.samples.items()}
            while time.monotonic() < deadline or not soak.faults:
                rounds += 1
                soak.round(f"round-{rounds}", deadline)
            soak.check(rounds)
        finally:
            over.set()
            sampler.join()
            soak.driver.kill()
            subprocess.run(["umount", "--lazy", soak.home], check=True)
    report.add(Row("faults", soak.faults, must=1, detail=dict(sorted(soak.ends.items()))))
    report.add(Row("rounds that they disturbed", rounds, must=1))
    report.add(Row("requests that the undisturbed run cancelled", given_up, must=1))
    report.add(Row("problems", len(soak.problems), must=0, most=True, detail={"problems": soak.problems}))
    for role, samples in sorted(watched.items()):
        for row in growth(role, samples):
            report.add(row)
    report.finish()
    return int(any(row.verdict == "short" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
