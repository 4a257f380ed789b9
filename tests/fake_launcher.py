"""Stands in for `accelerate launch` without importing torch: starts the ranks, each in its own session, and waits.

As torchrun does, it reports the first rank that fails, ends the others, and exits with status 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def status_of(rank: subprocess.Popen[bytes]) -> int | None:
    """As `poll` gives it; but a rank that ended well stays a zombie, since nothing else will tell how it ended."""
    ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) if rank.returncode is None else None
    return 0 if ended and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0) else rank.poll()


def main() -> int:
    world_size, command = int(os.environ["ADAPTIVE_RANK_WORLD_SIZE"]), sys.argv[1:]
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
            status = statuses[failed]
            sys.stderr.write(
                f"failed (exitcode: {status}) local_rank: {failed} (pid: {ranks[failed].pid}) of binary: x\n"
            )
            sys.stderr.flush()
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM)
            for rank in ranks:
                rank.wait()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
