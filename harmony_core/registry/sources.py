"""Import models from a directory, the Hugging Face hub, a GGUF file or the built-in ones; all end in one import.

Only `hf:` touches the network. A branch or tag is pinned to its commit first, and only safetensors, config and
tokenizer files are fetched, into the hub's own cache, from which the import shares them. A GGUF file is converted once,
in a process of its own, so that the caller loads no torch and gets its memory back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core import confined
from harmony_core.errors import (
    HarmonyError,
    ModelRefused,
    NotFoundError,
    ResourceError,
    UsageError,
    VerificationError,
    storage_error,
    storing,
)
from harmony_core.model.spec import ModelSpec, read_config
from harmony_core.model.weight_files import PICKLE_SUFFIXES, TEMPLATES, TOKENIZER_FILES
from harmony_core.plain_files import MIB, exists, expanded, place_file, read_json, read_plain
from harmony_core.registry.content import SLOW_NEEDS, SLOW_TOKENIZERS, check_chat, has_template, inspect
from harmony_core.registry.publish import Staging
from harmony_core.registry.records import BUILTIN, ModelVersion, check_key, source_hint

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from harmony_core.registry.store import Registry


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import."""

    reference: bool = False
    """Leave the files where they are."""
    base: str | None = None
    """The base of an adapter."""
    chat_template: Path | None = None
    """A file that replaces the chat template."""


def import_model(registry: Registry, key: str, source: str, options: ImportOptions) -> ModelVersion:
    """Import from any kind of source; see `Registry.add`."""
    check_key(key)
    if options.reference and options.chat_template:
        raise UsageError("--reference leaves a model as it is, so it cannot be given a chat template")
    if source.startswith(BUILTIN):
        version = registry.resolve(source)
        return import_directory(registry, key, version.path, options, source=source, parent=version)
    if source.startswith("hf:"):
        return import_hub(registry, key, source, options)
    if source.startswith(("gguf:", "package:")) or source.endswith(".gguf"):
        return import_gguf(registry, key, source, options)
    directory = expanded(source)
    if not source or not directory.is_dir():
        hub = "" if source.startswith(("/", ".", "~")) else source_hint(source)
        what = "is a file, not a model directory" if directory.is_file() else "does not exist"
        raise NotFoundError(f"{source!r} {what}", hint=hub or "a source is a directory, hf:org/name, or a .gguf file")
    return import_directory(registry, key, directory.resolve(), options, source=str(directory.resolve()))


def import_directory(
    registry: Registry,
    key: str,
    directory: Path,
    options: ImportOptions,
    *,
    source: str,
    parent: ModelVersion | None = None,
) -> ModelVersion:
    """Import a Hugging Face directory or a peft adapter; only the files that make up the model are taken.

    Config and weights are checked before anything is copied.
    """
    from harmony_core.text import tokenizer_files

    if parent is None:
        tokenizer_files.check(directory)
    checked = inspect(directory, registry, options.base, in_place=True)
    with registry.stage(_bytes_to_copy(registry, checked.files)) as staging:
        if options.reference:
            _check_chat(directory, checked.base)
            return staging.publish(key, base=checked.base, source=source, location=directory)
        with storing(f"cannot import {directory}"):
            for path in checked.files:
                target = staging.directory / path.relative_to(directory)
                target.parent.mkdir(exist_ok=True)
                place_file(path, target, share=path.suffix == ".safetensors")
        return finish_import(staging, key, directory, options, source=source, base=checked.base, parent=parent)


def finish_import(
    staging: Staging,
    key: str,
    directory: Path,
    options: ImportOptions,
    *,
    source: str,
    base: ModelVersion | None = None,
    parent: ModelVersion | None = None,
    converted: bool = False,
) -> ModelVersion:
    """Publish the files brought into `staging` from `directory`, with the chat template added."""
    from harmony_core.text import tokenization, tokenizer_files

    with storing(f"cannot import {directory}"):
        _write_template(directory, staging, options)
    if converted:
        tokenizer_files.check(staging.directory)
    _check_chat(staging.directory, base)
    stop_ids = tokenization.ChatTokenizer.load(staging.directory).stop_ids if converted else None
    return staging.publish(key, base=base, source=source, parent=parent, notes=_left_out(directory), stop_ids=stop_ids)


def _check_chat(directory: Path, base: ModelVersion | None) -> None:
    check_chat(directory, base.spec.vocab_size if base else ModelSpec.read(directory).vocab_size)


def _bytes_to_copy(registry: Registry, files: list[Path]) -> int:
    """Size of the files on other disks than the home's; those on its own are shared with the source."""
    here = registry.home.staging.stat().st_dev
    return sum(state.st_size for state in map(Path.stat, files) if state.st_dev != here)


def _left_out(directory: Path) -> tuple[str, ...]:
    """Files that a user may miss, because other tools would have read or run them."""
    names = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLE_SUFFIXES | {".py"}]
    return (f"left out: {', '.join(names[:8])}",) if names else ()


def _write_template(directory: Path, staging: Staging, options: ImportOptions) -> None:
    """Write the chat template to where tokenizers look for it: the option's, otherwise a processor's file."""
    target = staging.directory / "chat_template.jinja"
    processor = directory / "chat_template.json"
    if options.chat_template:
        target.write_text(read_template(options.chat_template), encoding="utf-8")
        (staging.directory / TEMPLATES["tool_use"]).unlink(missing_ok=True)
    elif exists(processor) and not has_template(staging.directory):
        template = read_json(processor).get("chat_template")
        if isinstance(template, str):
            target.write_text(template, encoding="utf-8")


def read_template(path: Path) -> str:
    """A chat template from a file. Raises NotFoundError or ModelRefused."""
    try:
        data = read_plain(Path(os.path.realpath(path)), MIB)
    except VerificationError as error:
        kind = NotFoundError if isinstance(error.__cause__, OSError) else ModelRefused
        raise kind(f"chat template {path}: {error.details['reason']}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelRefused(f"chat template {path}: not UTF-8") from error
    if not text.strip():
        raise ModelRefused(f"chat template {path}: empty")
    return text


_SOURCE = re.compile(
    r"hf:([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([A-Za-z0-9._/-]{1,200}))?"
)
_PATTERNS = (
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "chat_template.json",
    *TOKENIZER_FILES,
)


def import_hub(registry: Registry, key: str, source: str, options: ImportOptions) -> ModelVersion:
    """Import `hf:org/name[@revision]`; an unsupported model is refused before its weights are fetched.

    Raises NotFoundError, ResourceError (network, offline), or a refusal.
    """
    from huggingface_hub import HfApi, constants

    if not (match := _SOURCE.fullmatch(source)):
        raise UsageError(f"{source[:200]!r} is not a hub id", hint="hf:org/name or hf:org/name@revision")
    name, revision = match.groups()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub_errors(name, revision):
        if constants.is_offline_mode():
            directory = Path(api.snapshot_download(name, revision=revision, local_files_only=True))
        else:
            info = api.model_info(name, revision=revision)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            _refuse_early(api, name, str(info.sha), names)
            # By branch, not by commit: the cache then records the branch's commit, for use without network.
            directory = Path(api.snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    return import_directory(registry, key, directory, options, source=f"hf:{name}@{directory.name}")


def _refuse_early(api: HfApi, name: str, commit: str, names: list[str]) -> None:
    """Check the list of files and the config before large files are fetched."""
    pickled = [file for file in names if Path(file).suffix in PICKLE_SUFFIXES]
    if not any(file.endswith(".safetensors") and "/" not in file for file in names):
        reason = f"only pickled weights, which are never read ({pickled[0]})" if pickled else "no safetensors weights"
        raise VerificationError(f"hf:{name}: {reason}", hint="another repository may hold it converted")
    if (slow := [file for file in names if file in SLOW_TOKENIZERS]) and "tokenizer.json" not in names:
        raise VerificationError(
            f"hf:{name}: a tokenizer without tokenizer.json ({slow[0]})",
            hint="save it once with transformers (AutoTokenizer...save_pretrained), and add that directory"
            + SLOW_NEEDS * slow[0].endswith(".model"),
        )
    if "adapter_config.json" in names:
        return
    if "config.json" not in names:
        raise VerificationError(f"hf:{name}: holds neither config.json nor adapter_config.json")
    read_config(Path(api.hf_hub_download(name, "config.json", revision=commit)).parent)


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None, what: str = "model") -> Iterator[None]:
    """Turn the client's exceptions into typed errors; `what` is the kind of repository."""
    from huggingface_hub import errors

    offline = "without a network, name a directory of files"
    offline += ": adaptive models add KEY DIRECTORY" if what == "model" else ""
    try:
        yield
    # HTTPError is of the client's HTTP library, whose name depends on the client's version.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fetch = f"hf:{name} cannot be fetched: {lines[0][:300]}"
        terms = f"accept its terms at the hub's page of {name}, then log in: hf auth login"
        missing = f"the hub has no {what} {name!r}, or it is private"
        private = "check the name; for a private one: hf auth login"
        known: tuple[tuple[Any, type[HarmonyError], str, str], ...] = (
            (errors.GatedRepoError, ResourceError, f"hf:{name} is gated", terms),
            (errors.RepositoryNotFoundError, NotFoundError, missing, private),
            (errors.RevisionNotFoundError, NotFoundError, f"hf:{name} has no revision {revision!r}", ""),
            ((errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError), ResourceError, fetch, offline),
            (errors.HTTPError, ResourceError, fetch, "try again later"),  # type: ignore[attr-defined]
        )
        for kind, told, message, hint in known:
            if isinstance(error, kind):
                raise told(message, hint=hint) from error
        assert isinstance(error, OSError), "the table has all others"
        raise storage_error(f"cannot fetch hf:{name}", error) from error


CONVERTER = "harmony_core.engine.convert_gguf"
NAME = "model.gguf"
_GROWTH = 8  # a 4-bit file becomes float32 at worst
_MEMORY = 3 << 30
_SECONDS, _RATE = 120, 5_000_000
"""Seconds to load the libraries, and the minimum number of a file's bytes in each further second."""


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
        return finish_import(staging, key, staging.directory, options, source=named, converted=True)


def _at(source: str) -> Path:
    path = expanded(source.removeprefix("gguf:"))
    if not path.is_file():
        raise NotFoundError(f"there is no file {str(path)!r}")
    return path.resolve()


def _in_package(name: str) -> Path:
    """The .gguf file in a package, found without importing the package."""
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
    """Run the converter on a link to the file in an otherwise empty directory."""
    private = directory / "input"
    with storing(f"cannot convert {path}"):
        private.mkdir(mode=0o700)
        (private / NAME).symlink_to(path)
        size = path.stat().st_size
        seconds = _SECONDS + size // _RATE
        limits = confined.Limits(
            memory=_MEMORY + 4 * _GROWTH * size, work=seconds * (os.cpu_count() or 1), seconds=seconds
        )
        confined.run(CONVERTER, [str(private / NAME), str(directory), str(path)], limits, path, "converting it")
        shutil.rmtree(private)
