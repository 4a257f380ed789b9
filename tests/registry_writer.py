"""A process that saves a model again and again, to be killed: no torch, two hundred milliseconds to start.

    python registry_writer.py '{"home": ..., "source": ..., "key": ..., "saves": 3}'

Prints "ready" before the first save and one acknowledged reference a line. `die_at` n: it kills itself at the n-th
thing that the save does to the filesystem; without it the number of such things is printed at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy  # noqa: F401 - what a first save imports: a kill is to hit the save, not that

import harmony_core.text.tokenizer_files  # noqa: F401
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.registry.records import MANIFEST

WATCHED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.chmod", "fcntl.flock", "os.scandir"}


def say(text: str) -> None:
    os.write(1, (text + "\n").encode())


class Fuse:
    """Counts what is done to the filesystem; at `die_at` the process is gone, as with kill -9."""

    def __init__(self, die_at: int) -> None:
        self.die_at, self.count, self.lit = die_at, 0, False
        sys.addaudithook(self.see)

    def see(self, event: str, _: Any) -> None:
        if self.lit and event in WATCHED:
            self.count += 1
            if self.count == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)


def save(registry: Registry, key: str, source: Path) -> str:
    with registry.stage() as staging:
        for path in source.iterdir():
            shutil.copyfile(path, staging.directory / path.name)
        return staging.publish(key).ref


def save_naively(registry: Registry, key: str, source: Path) -> str:
    """What a save would be without staging; the tests must find it wanting."""
    number = max([0, *registry.versions(key)]) + 1
    directory = registry.directory(key, number)
    directory.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, directory / path.name)
    record = json.loads((source.parent / MANIFEST).read_text()) | {"key": key}
    (directory / MANIFEST).write_text(json.dumps(record))
    return f"{key}@{number}"


def main(options: dict[str, Any]) -> None:
    if options.get("no_locks"):
        fcntl.flock = lambda *_: None  # a disk on which everyone gets every lock
    registry = Registry(Home.open(options["home"]))
    source, key = Path(options["source"]), options["key"]
    one = save_naively if options.get("naive") else save
    fuse = Fuse(options.get("die_at", 0))
    say("ready")
    for _ in range(options["saves"]):
        fuse.lit = True
        ref = one(registry, key, source)
        fuse.lit = False
        say(ref)
    say(f"steps {fuse.count}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
