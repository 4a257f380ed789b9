"""Stands in for `accelerate launch` without importing torch: starts the ranks, each in its own session, and waits.

As torchrun does, it ends the others when one rank fails, reports the first that did and how each ended, and exits with
status 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time


def status_of(rank: subprocess.Popen[bytes]) -> int | None:
    """As `poll` gives it; but a rank that ended well stays a zombie, since nothing else will tell how it ended."""
    ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) if rank.returncode is None else None
    return 0 if ended and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0) else rank.poll()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    world_size, command = json.loads(os.environ["ADAPTIVE_RANK_OPTIONS"])["num_processes"], sys.argv[1:]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
            start_new_session=True,
        )
        for rank in range(world_size)
    ]
    while None in (statuses := [status_of(rank) for rank in ranks]):
        time.sleep(0.1)  # as often as torchrun looks
        failed = next((index for index, status in enumerate(statuses) if status), None)
        if failed is not None:
            for rank in ranks:
                if rank.poll() is None:
                    say(f"Sending process {rank.pid} closing signal SIGTERM")
                    rank.send_signal(signal.SIGTERM)
            for rank in ranks:
                rank.wait()
            say(f"failed (exitcode: {statuses[failed]}) local_rank: {failed} (pid: {ranks[failed].pid}) of binary: x")
            for rank in ranks:
                say(f"  exitcode  : {rank.returncode} (pid: {rank.pid})")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
