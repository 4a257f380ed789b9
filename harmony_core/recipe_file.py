"""A recipe's file and how it is imported: in the driver, and on ranks that run a loss function of it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path

from harmony_core.errors import HarmonyError, RecipeLoadError, ResourceError
from harmony_core.rpc.tracebacks import frames_in

OF_PLATFORM = ("PIL", "loguru", "math_verify")
"""Packages of the extra `platform`."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file as the run loaded it."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> RecipeFile:
        """The file as it is now."""
        return cls(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())


def import_file(path: Path, importable_folder: bool) -> types.ModuleType:
    """Execute the file as a submodule of a synthetic package, so that `from .x import y` finds its neighbours.

    With `importable_folder` these can also be imported by their own names. Raises RecipeLoadError.
    """
    folder = path.parent
    if importable_folder:
        for entry in (folder / "src", folder):
            if entry.is_dir() and str(entry) not in sys.path:
                sys.path.insert(0, str(entry))
    check_alias_package()
    package = "_adaptive_recipe_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]
    parent = types.ModuleType(package)
    parent.__path__ = [str(folder)]
    sys.modules[package] = parent
    loader = importlib.machinery.SourceFileLoader(f"{package}.{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        loader.exec_module(module)
    except HarmonyError as error:
        raise RecipeLoadError(f"{where_raised(error, path)}: {error.message}", hint=error.hint) from error
    except SyntaxError as error:
        raise RecipeLoadError(f"{error.filename or path}:{error.lineno or 1}: {error.msg}") from error
    except ImportError as error:
        raise RecipeLoadError(
            f"{where_raised(error, path)}: {type(error).__name__}: {error}", hint=_import_hint(error)
        ) from error
    except (Exception, SystemExit) as error:
        raise RecipeLoadError(f"{where_raised(error, path)}: {type(error).__name__}: {error}") from error
    return module


def where_raised(error: BaseException, path: Path) -> str:
    """The innermost frame of the traceback in the recipe's own folder, as `file:line`."""
    frames = [frame for frame in frames_in(error.__traceback__) if Path(frame.filename).is_relative_to(path.parent)]
    return f"{frames[-1].filename}:{frames[-1].line}" if frames else str(path)


def _import_hint(error: ImportError) -> str:
    if error.name and error.name.split(".")[0] in OF_PLATFORM:
        return "pip install 'harmony-core[platform]' installs what recipes of the platform import"
    if error.name and importlib.util.find_spec(error.name.split(".")[0]) is None:
        return f"install {error.name.split('.')[0]}, or name it in the recipe's `# /// adaptive` block"
    return ""


def check_alias_package() -> None:
    """Raise ResourceError if recipes would import another `adaptive_harmony` or `harmony_client` than ours."""
    import harmony_core

    for name in ("adaptive_harmony", "harmony_client"):
        spec = importlib.util.find_spec(name)
        found = [Path(location).resolve() for location in spec.submodule_search_locations or ()] if spec else []
        ours = Path(harmony_core.__file__).resolve().parent.parent / name
        if ours not in found:
            place = spec.origin if spec and spec.origin else found[0] if found else None
            raise ResourceError(
                f"another {name} is in the way: {place}" if place else f"the package {name} is missing",
                hint="uninstall or rename it, then install harmony-core again",
            )
