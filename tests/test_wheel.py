"""The wheel, built from a clean copy, installed where there is no checkout, and used."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adaptive_harmony", "cli", "harmony_client", "harmony_core", "recipes", "tests")
FILES = ("LICENSE", "README.md", "pyproject.toml")

pytestmark = pytest.mark.slow


def output(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints; it must end well."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=kept | variables, capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy that holds no build folder and no egg-info, with the tests in it to see that they stay out."""
    copy = tmp_path_factory.mktemp("build") / "source"
    copy.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    # Without a network where setuptools is here; otherwise the builder fetches the version that is asked for.
    here = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    isolation = ["--no-isolation"] if here else []
    output([sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(copy / "out"), str(copy)], copy)
    (found,) = (copy / "out").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment with the wheel, which sees this one's libraries but not its checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A folder that a .pth file names is searched, but its own .pth files are not read: no editable install leaks in.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    output([*pip, "install", "--no-deps", "--no-index", str(wheel)], folder)
    return folder / "bin"


def test_what_the_wheel_holds(wheel: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top_level,) = [name for name in names if name.endswith(".dist-info/top_level.txt")]
        assert archive.read(top_level).decode().split() == ["adaptive_harmony", "harmony_client", "harmony_core"]
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {"adaptive_harmony", "harmony_client", "harmony_core"}
    inits = [name for name in inside if name.endswith("/__init__.py")]
    assert {name.rpartition("/")[0].replace("/", ".") for name in inits} == set(packages)
    for folder, mount in {"adaptive_harmony": "adaptive_harmony", "cli": "harmony_core/cli"}.items():
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{mount}/{file.relative_to(ROOT / folder).as_posix()}" in inside
    for file in (ROOT / "harmony_core").rglob("*.py"):
        assert file.relative_to(ROOT).as_posix() in inside
    for file in (*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes").glob("*.yaml")):
        assert f"harmony_core/recipes/{file.name}" in inside
    for file in (ROOT / "recipes" / "data").glob("*.jsonl"):
        assert f"harmony_core/recipes/data/{file.name}" in inside
    assert {f"harmony_core/runs/report/page.{kind}" for kind in ("css", "html", "js")} <= inside
    assert {"harmony_core/py.typed", "adaptive_harmony/py.typed", "harmony_client/py.typed"} <= inside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_only_two_names_are_importable(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, harmony_core\n"
        "names = ['adaptive_harmony', 'harmony_core', 'harmony_core.cli', 'harmony_core.recipes',"
        " 'cli', 'recipes', 'tests']\n"
        "print(json.dumps([harmony_core.__file__, [n for n in names if importlib.util.find_spec(n)]]))"
    )
    place, found = json.loads(output([str(installed / "python"), "-c", code], tmp_path))
    assert Path(place).is_relative_to(installed.parent)
    assert found == ["adaptive_harmony", "harmony_core", "harmony_core.cli", "harmony_core.recipes"]


def test_the_quickstart_runs_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert not tmp_path.is_relative_to(ROOT)
    home = tmp_path / "home"
    words = ["run", "quickstart", "--epochs", "0.1", "--at-least", "0"]
    shown = output([str(installed / "adaptive"), *words], tmp_path, ADAPTIVE_HOME=str(home))
    assert re.fullmatch(r"held-out accuracy: \d\.\d\d", shown.splitlines()[-1])
    first = min(path for path in (home / "runs").iterdir())
    recorded = (first / "events.jsonl").read_text("utf-8").splitlines()
    (resolved,) = [e for e in map(json.loads, recorded) if e["type"] == "config.resolved"]
    assert Path(resolved["data"]["recipe"]).is_relative_to(installed.parent)


def test_the_documented_names_work_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from adaptive_harmony.parameters import Model\n"
        "from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main\n"
        "class Config(InputConfig):\n    model: Model\n"
        "@recipe_main\n"
        "async def main(config: Config, ctx: RecipeContext) -> int:\n"
        "    await config.model.spawn_inference('m', ctx)\n    return ctx.world_size\n",
        encoding="utf-8",
    )
    words = ["run", "recipe.py", "--model", "builtin:tiny-lm", "--dry-run", "--json", "--device", "cpu"]
    shown = output([str(installed / "adaptive"), *words], tmp_path, ADAPTIVE_HOME=str(tmp_path / "home"))
    answer = json.loads(shown)
    assert (answer["status"], answer["result"], len(answer["plan"])) == ("planned", 1, 1)
