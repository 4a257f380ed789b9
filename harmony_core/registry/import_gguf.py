"""Importing a GGUF file: converted once, in a process of its own, so that the caller loads no torch and gets its
memory back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import HarmonyError, InternalError, NotFoundError, ResourceError, UsageError, all_errors
from harmony_core.registry.importing import ImportOptions, finish_import
from harmony_core.registry.versions import ModelVersion

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

CONVERTER = "harmony_core.engine.convert_gguf"
_GROWTH = 8  # a 4-bit file becomes float32 at worst


def import_gguf(registry: Registry, key: str, source: str, options: ImportOptions) -> ModelVersion:
    """Import `gguf:PATH`, `PATH.gguf`, or `package:NAME`, the one .gguf file of an installed Python package."""
    if options.reference:
        raise UsageError("a GGUF file is converted, so it cannot be left where it is", hint="leave out --reference")
    path = _in_package(source.removeprefix("package:")) if source.startswith("package:") else _at(source)
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError(f"reading {path.name} needs the package gguf", hint="pip install harmony-core[gguf]")
    with registry.stage(path.stat().st_size * _GROWTH) as staging:
        _convert(path, staging.directory)
        named = source if source.startswith("package:") else f"gguf:{path}"
        return finish_import(staging, key, staging.directory, options, source=named)


def _at(source: str) -> Path:
    path = Path(source.removeprefix("gguf:")).expanduser()
    if not path.is_file():
        raise NotFoundError(f"there is no file {str(path)!r}")
    return path.resolve()


def _in_package(name: str) -> Path:
    """The .gguf file that a package carries, found without importing it."""
    top = name.replace("-", "_")
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise NotFoundError(f"there is no installed Python package {name[:100]!r}", hint=f"pip install {name[:100]}")
    found = sorted(path for root in roots for path in Path(root).rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise NotFoundError(f"the package {name!r} should carry one .gguf file: {names}", hint="gguf:PATH names one")
    return found[0].resolve()


def _convert(path: Path, directory: Path) -> None:
    """Run the converter; its answer is one line of JSON, its other output is shown only when it fails."""
    # -P: what lies in the working directory must not stand in for a package.
    command = [sys.executable, "-P", "-m", CONVERTER, str(path), str(directory)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    answer = _answer(done.stdout)
    error = answer.get("error")
    if error:
        kind = all_errors().get(str(error.get("type")), InternalError)
        raise kind(str(error.get("message")), hint=str(error.get("hint", "")))
    if done.returncode or not answer.get("ok"):
        raise _died(path, done)


def _answer(output: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    return answer if isinstance(answer, dict) else {}


def _died(path: Path, done: subprocess.CompletedProcess[str]) -> HarmonyError:
    if done.returncode == -9:
        return ResourceError(f"{path}: the converter was killed, most likely for want of memory")
    tail = "\n".join(done.stderr.strip().splitlines()[-15:])
    return InternalError(f"{path}: the converter ended with exit code {done.returncode}\n{tail}")
