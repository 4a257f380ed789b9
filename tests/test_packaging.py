"""What is installed under which name, seen from the checkout and from the installed distribution."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distribution, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import harmony_core
from source_tree import FOLDERS, MOUNTED, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def installed_name(folder: Path) -> str:
    parts = list(folder.relative_to(ROOT).parts)
    return ".".join([MOUNTED.get(parts[0], parts[0]), *parts[1:]])


def packages_on_disk() -> dict[str, Path]:
    """Every folder with an `__init__.py`, by the name under which it is installed."""
    found = [file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("__init__.py")]
    return {installed_name(folder): folder for folder in found}


def test_every_package_is_listed() -> None:
    assert SETUPTOOLS["packages"] == sorted(packages_on_disk())


def test_every_folder_with_code_is_a_package() -> None:
    packages = set(packages_on_disk().values())
    scripts = {ROOT / "recipes" / "data"}  # it holds the script that made the data, which is not shipped
    stray = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")} - packages - scripts
    assert stray == set()


def test_the_two_mounted_folders_are_mapped() -> None:
    assert SETUPTOOLS["package-dir"] == {name: folder for folder, name in MOUNTED.items()}


def test_every_data_file_is_shipped() -> None:
    patterns = SETUPTOOLS["package-data"]
    unlisted = []
    for folder in FOLDERS:
        name = MOUNTED.get(folder, folder)
        for file in (ROOT / folder).rglob("*"):
            inside = file.relative_to(ROOT / folder).as_posix()
            kept = file.is_file() and file.suffix not in (".py", ".pyc")
            if kept and not any(fnmatch(inside, pattern) for pattern in patterns.get(name, ())):
                unlisted.append(f"{folder}/{inside}")
    assert unlisted == []
    for name in ("harmony_core", "adaptive_harmony", "harmony_client"):
        assert (ROOT / name / "py.typed").is_file()


def test_the_command_is_the_mounted_folder() -> None:
    (script,) = entry_points(group="console_scripts", name="adaptive")
    main = script.load()
    assert main.__module__ == "harmony_core.cli"
    assert main(["--version"]) == 0


def test_only_three_names_are_importable(tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, sys\n"
        "names = ['adaptive_harmony', 'harmony_client', 'harmony_core', 'harmony_core.cli', 'harmony_core.recipes',"
        " 'cli', 'recipes', 'tests', 'benchmarks', 'docs']\n"
        "print(json.dumps([name for name in names if sys.argv[1] in str(importlib.util.find_spec(name))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    mounted = ["harmony_core.cli", "harmony_core.recipes"]
    assert json.loads(done.stdout) == ["adaptive_harmony", "harmony_client", "harmony_core", *mounted]


def test_the_installed_distribution_claims_only_three_names() -> None:
    claimed = (distribution("harmony-core").read_text("top_level.txt") or "").split()
    assert sorted(claimed) == ["adaptive_harmony", "harmony_client", "harmony_core"]


def test_one_version_everywhere() -> None:
    assert PROJECT["project"]["version"] == harmony_core.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert newest and newest[1] == harmony_core.__version__


def locked(name: str) -> list[str]:
    """The entries of a lock file, one string each with its hashes."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def versions(name: str) -> dict[str, str]:
    """Version of each package of a lock file, on this Python."""
    entries = [Requirement(line.split(" --hash")[0]) for line in locked(name)]
    return {e.name: str(e.specifier)[2:] for e in entries if e.marker is None or e.marker.evaluate()}


def required(*extras: str) -> list[Requirement]:
    """What the project asks for with some of its extras, extras of its own followed."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    found = [Requirement(line) for line in wanted]
    own = [r for r in found if r.name == project["name"]]
    return [r for r in found if r not in own] + [r for inner in own for r in required(*inner.extras)]


@pytest.mark.parametrize(
    ("name", "extras"),
    [("run", ()), ("smollm2", ("smollm2",)), ("dev", ("dev",)), ("slow", ("dev", "peers", "smollm2"))],
)
def test_a_lock_has_what_the_project_asks_for(name: str, extras: tuple[str, ...]) -> None:
    torch = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8").splitlines()[-1].split("==")
    pins = versions(f"{name}.txt") | {torch[0]: torch[1]}
    for requirement in required(*extras):
        pin = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pin), f"{requirement} is locked at {pin}: run make lock"


@pytest.mark.parametrize("name", ["run.txt", "smollm2.txt", "dev.txt", "slow.txt"])
def test_everything_locked_has_hashes(name: str) -> None:
    for entry in locked(name):
        assert re.match(r"[a-z0-9.-]+==[^ ]+( ; [^-]+)? +--hash=sha256:", entry), entry[:100]
        assert not entry.startswith(("torch==", "nvidia-", "cuda-")), "the standard build of torch brings these"


def test_the_locks_agree() -> None:
    everything = versions("slow.txt")
    for name in ("run.txt", "smollm2.txt", "dev.txt"):
        assert versions(name).items() <= everything.items(), name


def test_this_environment_is_the_locked_one() -> None:
    """In CI only: elsewhere one may try other versions."""
    if "CI" not in os.environ:
        pytest.skip("only CI has to run the locked versions")
    assert {name: version(name) for name in versions("dev.txt")} == versions("dev.txt")
