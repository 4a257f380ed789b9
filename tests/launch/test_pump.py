"""The reader of the ranks' output: nothing is lost, nobody waits, secrets are masked, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harmony_core.launch.processes import start_reader
from harmony_core.plain_files import is_locked
from harmony_core.redaction import MASK
from leftovers import wait_until

WRITES = """
import os, signal, sys
pipe, megabytes, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
out = os.open(pipe, os.O_WRONLY)
block = b"".join(b"line %07d of the secret canary-secret" % n + b"x" * 60 + b"\\n" for n in range(10_000))
for _ in range(megabytes):
    left = block
    while left:
        left = left[os.write(out, left):]
os.write(out, b"the end without a newline")
os.kill(os.getpid(), signal.Signals[end]) if end else None
"""
BLOCK = b"".join(b"line %07d of the secret " % n + MASK.encode() + b"x" * 60 + b"\n" for n in range(10_000))


def writer(tmp_path: Path, name: str, megabytes: int, end: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path / f"{name}.out"), str(megabytes), end])


def ended(process: subprocess.Popen[bytes], seconds: float = 60) -> bool:
    return wait_until(lambda: process.poll() is not None, seconds)


@pytest.mark.parametrize("end", ["", "SIGSEGV", "SIGKILL"])
def test_all_that_was_written_is_kept_however_the_writer_ends(tmp_path: Path, end: str) -> None:
    reader = start_reader(tmp_path, tmp_path, ["launcher", "rank-0", "rank-1"], ["canary-secret"])
    held = os.open(tmp_path / "launcher.out", os.O_WRONLY)  # as a rank does until it has its own pipe
    writers = [writer(tmp_path, name, 3, end) for name in ("launcher", "rank-0")]
    assert all(map(ended, writers))
    os.close(held)
    assert ended(reader)
    for name in ("launcher", "rank-0"):
        assert not is_locked(tmp_path / f"{name}.log")
        assert (tmp_path / f"{name}.log").read_bytes() == BLOCK * 3 + b"the end without a newline"
    assert (tmp_path / "rank-1.log").read_bytes() == b""  # never began, and keeps nobody waiting


def test_a_writer_never_waits_for_the_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "launcher.log")
    disk = os.open(tmp_path / "launcher.log", os.O_RDWR)  # takes 64 KB and then no more
    reader = start_reader(tmp_path, tmp_path, ["launcher"], ["canary-secret"])
    process = writer(tmp_path, "launcher", 40)
    assert ended(process)
    written = b""
    while not written.endswith(b"the end without a newline"):
        written += os.read(disk, 1 << 20)
    os.close(disk)
    assert written == BLOCK * 40 + b"the end without a newline" and ended(reader)


STARTS = """
import os, signal, subprocess, sys
from pathlib import Path
from harmony_core.launch.processes import start_reader
here = Path(sys.argv[1])
start_reader(here, here, ["launcher"], ["canary-secret"])
subprocess.Popen([sys.executable, "-c", sys.argv[2], str(here / "launcher.out"), "20", ""])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_reader_outlives_a_killed_driver(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", STARTS, str(tmp_path), WRITES]).returncode == -signal.SIGKILL
    log = tmp_path / "launcher.log"
    assert wait_until(lambda: not is_locked(log), 60)
    assert log.read_bytes() == BLOCK * 20 + b"the end without a newline"


def test_what_comes_in_pieces_is_masked_as_a_whole(tmp_path: Path) -> None:
    reader = start_reader(tmp_path, tmp_path, ["launcher"], ["canary-secret"])
    pem = "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----\n"
    with (tmp_path / "launcher.out").open("wb", buffering=0) as out:
        for piece in (b"a canary-", b"secret\nhf_abc", b"d" * 20 + b"123\n", *(b"%c" % byte for byte in pem.encode())):
            out.write(piece)
    assert ended(reader)
    assert (tmp_path / "launcher.log").read_text() == f"a {MASK}\n{MASK}\n{MASK}\n"


@pytest.mark.parametrize("told", [b"", b'{"pairs": [["a'])
def test_a_driver_that_is_killed_before_it_says_what_to_read_leaves_no_word(told: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harmony_core.launch.pump"], input=told, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
