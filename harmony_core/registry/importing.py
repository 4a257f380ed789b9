"""Bringing models in: what a source means, and the directory import that every other source ends in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harmony_core.errors import ModelRefused, NotFoundError, UsageError
from harmony_core.registry.builtin import resolve_builtin
from harmony_core.registry.content import has_template, inspect
from harmony_core.registry.files import place_file, storage_error
from harmony_core.registry.keys import BUILTIN, check_key, source_hint
from harmony_core.registry.staging import Staging
from harmony_core.registry.versions import ModelVersion
from harmony_core.weight_files import PICKLE_SUFFIXES, read_json

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

_MAX_TEMPLATE = 1024 * 1024


@dataclass(frozen=True)
class ImportOptions:
    """How to bring a model in."""

    reference: bool = False
    """Leave the files where they are."""
    base: str | None = None
    """What an adapter belongs to."""
    chat_template: Path | None = None
    """A file that replaces the chat template."""


def import_model(registry: Registry, key: str, source: str, options: ImportOptions) -> ModelVersion:
    """Import from any kind of source; see `Registry.add`."""
    check_key(key)
    if options.reference and options.chat_template:
        raise UsageError("--reference leaves a model as it is, so it cannot be given a chat template")
    if source.startswith(BUILTIN):
        version = resolve_builtin(registry.home, source.removeprefix(BUILTIN))
        return import_directory(registry, key, version.path, options, source=source, parent=version)
    if source.startswith("hf:"):
        from harmony_core.registry.import_hub import import_hub

        return import_hub(registry, key, source, options)
    if source.startswith(("gguf:", "package:")) or source.endswith(".gguf"):
        from harmony_core.registry.import_gguf import import_gguf

        return import_gguf(registry, key, source, options)
    directory = Path(source).expanduser()
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

    Everything is checked before a byte is copied.
    """
    checked = inspect(directory, registry, options.base, in_place=True)
    with registry.stage(_bytes_to_copy(registry, checked.files)) as staging:
        if options.reference:
            return staging.publish(key, base=checked.base, source=source, location=directory)
        try:
            for path in checked.files:
                place_file(path, staging.directory / path.name, share=path.suffix == ".safetensors")
        except OSError as error:
            raise storage_error(f"cannot import {directory}", error) from error
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
) -> ModelVersion:
    """Publish what was brought into `staging` from `directory`, with its chat template in its place."""
    try:
        _write_template(directory, staging, options)
    except OSError as error:
        raise storage_error(f"cannot import {directory}", error) from error
    return staging.publish(key, base=base, source=source, parent=parent, notes=_left_out(directory))


def _bytes_to_copy(registry: Registry, files: list[Path]) -> int:
    """Size of the files on other disks than the home's; those on its own are shared with the source."""
    here = registry.home.staging.stat().st_dev
    states = [path.stat() for path in files]
    return sum(state.st_size for state in states if state.st_dev != here)


def _left_out(directory: Path) -> tuple[str, ...]:
    """Files that a user may miss, because other tools would have read or run them."""
    names = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLE_SUFFIXES | {".py"}]
    return (f"left out: {', '.join(names[:8])}",) if names else ()


def _write_template(directory: Path, staging: Staging, options: ImportOptions) -> None:
    """Bring the chat template into a place where tokenizers look for it: an option's, else a processor's file."""
    target = staging.directory / "chat_template.jinja"
    processor = directory / "chat_template.json"
    if options.chat_template:
        target.write_text(read_template(options.chat_template), encoding="utf-8")
    elif processor.is_file() and not has_template(staging.directory):
        template = read_json(processor).get("chat_template")
        if isinstance(template, str):
            target.write_text(template, encoding="utf-8")


def read_template(path: Path) -> str:
    """A chat template from a file. Raises NotFoundError or ModelRefused."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"chat template {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelRefused(f"chat template {path}: not UTF-8") from error
    if len(data) > _MAX_TEMPLATE or not text.strip():
        raise ModelRefused(f"chat template {path}: empty, or larger than {_MAX_TEMPLATE // 1024} KiB")
    return text
