"""Writes home.tar.gz with an installed version: python make.py PATH/OF/ITS/adaptive

The archive is a home with models, an alias, finished runs and a stopped one, and expected.json: the log-probs of the
stored models and what an equal run that nothing stopped has logged. Folders of this machine have placeholders in it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARCHIVE = HERE / "home.tar.gz"
FOLDER = "/folder-of-the-fixture"
"""Stands for the folder that holds `home` and recipe.py."""
NAMED = ("run.json", "models.json", "events.jsonl")
"""Files of a run that name folders."""


def replace(runs: Path, old: str, new: str) -> None:
    """In the files of runs that name folders."""
    for file in (file for name in NAMED for file in runs.glob(f"*/{name}")):
        file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")


def unpack(folder: Path) -> dict[str, Any]:
    """The home and the recipe in `folder`. Returns what is expected of them."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    replace(folder / "home" / "runs", FOLDER, str(folder))
    shutil.copy(HERE / "recipe.py", folder)
    expected: dict[str, Any] = json.loads((folder / "expected.json").read_text("utf-8"))
    return expected


def make(adaptive: str, folder: Path) -> None:
    """Run the commands of an installed version, and pack what they leave."""
    shutil.copy(HERE / "recipe.py", folder)
    home = folder / "home"
    environment = {**os.environ, "ADAPTIVE_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def call(*words: str, code: int = 0) -> dict[str, Any]:
        done = subprocess.run([adaptive, *words, "--json"], cwd=folder, env=environment, stdout=subprocess.PIPE)
        assert done.returncode == code, done
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    finished = call("run", "recipe.py", "--keep-checkpoints", "2")
    full = call("run", "recipe.py", "--no-adapter", "--save-as", "trained", "--keep-checkpoints", "0")
    call("run", "recipe.py", "--model", "trained", "--save-as", "adapter", "--keep-checkpoints", "0")
    call("models", "alias", "adapter", "good=1")
    call("models", "set", "adapter", "tokens_to_generate=32")
    scored = ["builtin:tiny-lm", "trained@1", "adapter@good", "adapter@2"]
    words = ("run", "recipe.py", "--save-as", "resumed", "--score", json.dumps(scored))
    whole = call(*words)
    events = map(json.loads, (home / "runs" / whole["run"] / "events.jsonl").read_text("utf-8").splitlines())
    losses = [event["data"]["loss"] for event in events if event["type"] == "optim_step"]
    shutil.rmtree(home / "runs" / whole["run"])
    shutil.rmtree(home / "models" / "resumed")
    stopped = call(*words, "--stop-at", "0.25", code=75)
    expected = {
        "runs": {"finished": finished["run"], "full": full["run"], "stopped": stopped["run"]},
        "logprobs": whole["result"]["logprobs"],
        "losses": losses,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", "utf-8")
    replace(home / "runs", str(folder), FOLDER)
    replace(home / "runs", f'"host": "{socket.gethostname()}"', '"host": "localhost"')
    for page in (home / "runs").glob("*/report.html"):
        page.unlink()
    for name in ("cache", "locks", "staging", "trash"):
        shutil.rmtree(home / name)
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        for name in ("expected.json", "home"):
            archive.add(folder / name, name, filter=of_nobody)


def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the user who made it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        make(sys.argv[1], Path(name).resolve())
