"""What docs/security.md says that a run opens on the network, read from the kernel's tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = '''
import json
from pathlib import Path
from adaptive_harmony.runtime import RecipeContext, recipe_main

LISTENING = "0A"

def family(pid):
    """The process and everything below it."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from family(child)
    yield pid

def listening():
    """Local addresses, in hexadecimal, by the inode of their socket."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: row[1].rpartition(":")[0] for row in rows if row[3] == LISTENING}

@recipe_main
async def main(ctx: RecipeContext):
    await ctx.client.model("builtin:tiny-lm", kv_cache_len=1024).tp(ctx.world_size).spawn_inference("m")
    table, found = listening(), {}
    for pid in family("self"):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            inode = link.readlink().name.removeprefix("socket:[").removesuffix("]") if link.is_symlink() else ""
            if inode in table:
                name = "driver" if pid == "self" else Path(f"/proc/{pid}/cmdline").read_text().split("\\0")[3]
                found.setdefault(name, []).append(table[inode])
    return found
'''
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_ports_are_those_that_the_documentation_names(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "ports.py").write_text(RECIPE, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("adaptive")), "run", "ports.py", "--json", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--num-processes", str(ranks)],
        cwd=tmp_path,
        env=os.environ | {"ADAPTIVE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=720,
    )
    assert done.returncode == 0, done.stderr
    ports = json.loads(done.stdout)["result"]
    rank_ports = ports.pop("harmony_core.engine.process")
    assert ports == {}, "neither the driver nor the launcher listens"
    assert set(rank_ports) <= LOOPBACK
    assert len(rank_ports) == (1 if ranks == 1 else 2 * 4)
