"""What is installed under which name, seen from the checkout and from the installed distribution."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distribution, entry_points
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

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
    for name in ("harmony_core", "adaptive_harmony"):
        assert (ROOT / name / "py.typed").is_file()


def test_the_command_is_the_mounted_folder() -> None:
    (script,) = entry_points(group="console_scripts", name="adaptive")
    main = script.load()
    assert main.__module__ == "harmony_core.cli"
    assert main(["--version"]) == 0


def test_only_two_names_are_importable(tmp_path: Path) -> None:
    code = (
        "import importlib.util, json\n"
        "names = ['adaptive_harmony', 'harmony_core', 'harmony_core.cli', 'harmony_core.recipes',"
        " 'cli', 'recipes', 'tests', 'benchmarks', 'docs']\n"
        "print(json.dumps([name for name in names if importlib.util.find_spec(name)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["adaptive_harmony", "harmony_core", "harmony_core.cli", "harmony_core.recipes"]


def test_the_installed_distribution_claims_only_two_names() -> None:
    claimed = (distribution("harmony-core").read_text("top_level.txt") or "").split()
    assert sorted(claimed) == ["adaptive_harmony", "harmony_core"]


def test_one_version_everywhere() -> None:
    assert PROJECT["project"]["version"] == harmony_core.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert newest and newest[1] == harmony_core.__version__


def test_constraints_lie_within_the_requirements() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["peers"]]
    needed = {r.name.lower(): r for r in map(Requirement, wanted)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "-"))]
    assert "torch" in {pin.name for pin in pins}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and needed[pin.name].specifier.contains(Version(exact.version)), pin
