"""A driver in a process of its own: starts ranks, writes their pids to a file as JSON, waits for a failure, tells it.

Arguments: file for the pids, log directory, run id, number of ranks, "fake" or "echo". At SIGUSR1 it makes the file of
the pids with ".alive" behind its name, to show that it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from harmony_core.launch.launcher import Launch
from harmony_core.launch.supervisor import Supervisor
from harmony_core.options import EngineOptions

TESTS = Path(__file__).parents[1]


async def main() -> None:
    report, logs, run_id, count, kind = sys.argv[1:]
    options = EngineOptions(
        log_dir=Path(logs),
        run_id=run_id,
        command=[sys.executable, "-P", str(TESTS / f"{kind}_rank.py")],
        launcher=[sys.executable, "-P", str(TESTS / "fake_launcher.py")] if kind == "fake" else None,
    )
    supervisor = await Supervisor.start(options, Launch("cpu", int(count)), lambda rank, event: None)
    ranks = await supervisor.ready()
    pids = {"driver": os.getpid(), "launcher": supervisor._processes.launcher_pid}
    pids |= {f"rank{rank.rank}": rank.pid for rank in ranks}
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, Path(report + ".alive").touch)
    Path(report + ".tmp").write_text(json.dumps(pids))
    os.replace(report + ".tmp", report)
    failure = await supervisor.failure
    Path(report + ".failure").write_text(f"{type(failure).__name__}: {failure}")
    await supervisor.stop()


if __name__ == "__main__":
    asyncio.run(main())
