"""`adaptive models ...`: the registry from a shell. Results go to stdout, remarks to stderr."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from harmony_core.errors import HarmonyError, UsageError, VerificationError
from harmony_core.home import Home
from harmony_core.memory.ledger import format_size
from harmony_core.registry import ModelEntry, ModelVersion, Registry

from . import output

app = typer.Typer(
    name="models",
    help="Models in the registry: add, look at, set defaults, remove.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="key, key@3, key@alias or builtin:NAME.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The model's name in the registry.")]


def _registry(writes: bool = True) -> Registry:
    return Registry(Home.open(writes=writes))


def _describe(version: ModelVersion) -> dict[str, Any]:
    """A version as plain data."""
    spec = version.spec
    defaults = {
        name: {"value": value, "source": source} for name, (value, source) in version.defaults.effective().items()
    }
    return {
        "ref": version.ref,
        "key": version.key,
        "version": version.version,
        "path": str(version.path),
        "format": version.format,
        "kind": version.kind,
        "trainable": version.trainable,
        "architecture": spec.architecture,
        "parameters": spec.num_parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "vocabulary": spec.vocab_size,
        "max_positions": spec.max_positions,
        "stored_dtype": spec.stored_dtype,
        "tokenizer": str(version.tokenizer_dir) if version.tokenizer_dir else None,
        "bytes": version.bytes,
        "digest": version.digest,
        "base": version.base.ref if version.base else None,
        "parent": version.parent or None,
        "source": version.source or None,
        "run": version.run_id or None,
        "step": version.step,
        "created": version.created or None,
        "notes": list(version.notes),
        "defaults": defaults,
    }


@app.command()
def add(
    key: Key,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A directory (Hugging Face model or peft adapter), hf:org/name[@revision], a .gguf file, "
            "package:NAME (the .gguf file of an installed Python package) or builtin:NAME.",
        ),
    ],
    base: Annotated[str | None, typer.Option("--base", metavar="REF", help="What an adapter belongs to.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Leave the files where they are.")] = False,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Take the chat template from this file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="As in `models set`; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Import a model as the next version of KEY; prints its exact reference."""
    values = _settings(settings or [], [])
    registry = _registry()
    version = registry.add(key, source, reference=reference, base=base, chat_template=chat_template)
    if values:
        version = registry.set_defaults(key, values)
    for note in version.notes:
        typer.echo(f"note: {version.ref}: {note}", err=True)
    output.answer(as_json, {"model": _describe(version)}, version.ref)


@app.command("list")
def list_models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Only keys like this, such as 'qwen*'.")] = "*",
    as_json: Json = False,
) -> None:
    """Every key with its newest version."""
    found = [entry for entry in _registry(writes=False).list() if fnmatch.fnmatchcase(entry.key, pattern)]
    rows = [("KEY", "VERSIONS", "FORMAT", "PARAMETERS", "SIZE", "ALIASES", "DESCRIPTION"), *map(_row, found)]
    lines = output.table(rows) if found else ()
    output.answer(as_json, {"models": [_listed(entry) for entry in found]}, *lines)
    if not found and not as_json:
        typer.echo("no models yet; builtin:tiny-lm is always there (adaptive models add KEY SOURCE)", err=True)


def _row(entry: ModelEntry) -> tuple[str, ...]:
    newest = entry.newest
    aliases = " ".join(f"{name}={number}" for name, number in sorted(entry.aliases.items()))
    versions = f"{len(entry.versions)} (newest {entry.versions[-1]})" if entry.versions else "0"
    if newest is None:
        return entry.key, versions, "damaged", "", "", aliases, entry.problem
    parameters = f"{newest.spec.num_parameters / 1e6:,.1f}M"
    return entry.key, versions, newest.format, parameters, format_size(newest.bytes), aliases, entry.description


def _listed(entry: ModelEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "versions": list(entry.versions),
        "aliases": entry.aliases,
        "description": entry.description,
        "problem": entry.problem or None,
        "newest": _describe(entry.newest) if entry.newest else None,
    }


@app.command()
def show(ref: Ref, as_json: Json = False) -> None:
    """What a version is, and each effective inference default with where it comes from."""
    values = _describe(_registry(writes=False).resolve(ref))
    lines = [f"{name:<14} {_text(name, value)}" for name, value in values.items() if value not in (None, [], "")]
    lines = [line for line in lines if not line.startswith("defaults")]
    lines.append("inference defaults")
    for name, entry in values["defaults"].items():
        found = entry["value"]
        value = f"{found:,}" if isinstance(found, int) else "as much as fits, up to 131,072"
        value = json.dumps(found) if isinstance(found, dict) else value
        lines.append(f"  {name:<20} {value}   ({entry['source']})")
    output.answer(as_json, {"model": values}, *lines)


def _text(name: str, value: object) -> str:
    if name == "bytes" and isinstance(value, int):
        return format_size(value)
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and name != "version" else str(value)


@app.command("set")
def set_values(
    key: Key,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE",
            help="tp, kv_cache_len, tokens_to_generate, chat_template_kwargs (a JSON object), trainable or "
            "description; null unsets.",
        ),
    ] = None,
    unset: Annotated[list[str] | None, typer.Option("--unset", metavar="NAME", help="Take a value back.")] = None,
    as_json: Json = False,
) -> None:
    """Edit a key's inference defaults and description; prints the effective values."""
    values = _settings(settings or [], unset or [])
    if not values:
        raise UsageError("nothing to set", hint=f"adaptive models set {key} tp=2 kv_cache_len=8192")
    version = _registry().set_defaults(key, values)
    effective = {name: value for name, (value, _) in version.defaults.effective().items()}
    lines = [f"{name}={effective.get(name, value)}" for name, value in values.items()]
    output.answer(as_json, {"model": _describe(version)}, *lines)


def _settings(settings: list[str], unset: list[str]) -> dict[str, object]:
    """NAME=VALUE texts as typed values. The registry checks names and values."""
    values: dict[str, object] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text[:100]!r} is not NAME=VALUE", hint=f"{name}=8192, or --unset {name}")
        values[name.strip()] = value if name.strip() == "description" else _typed(value.strip())
    return values | dict.fromkeys(unset)


def _typed(text: str) -> object:
    words: dict[str, object] = {"null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text) if text.startswith("{") else int(text)
    except ValueError:
        return text


@app.command()
def alias(
    key: Key,
    setting: Annotated[str, typer.Argument(metavar="NAME[=VERSION]", help="Without VERSION: the newest.")],
    remove: Annotated[bool, typer.Option("--rm", help="Remove the alias.")] = False,
    as_json: Json = False,
) -> None:
    """Name a version, so that KEY@NAME means it; an existing alias moves."""
    registry = _registry()
    name, equals, number = setting.partition("=")
    if remove:
        registry.set_alias(key, name, None)
        output.answer(as_json, {"key": key, "removed": name}, f"removed {key}@{name}")
        return
    if equals and not (number.isascii() and number.isdigit()):
        raise UsageError(f"{number[:60]!r} is not a version number", hint=f"adaptive models alias {key} {name}=1")
    version = registry.resolve(f"{key}@{number}" if equals else key)
    registry.set_alias(key, name, version.version)
    output.answer(as_json, {"key": key, "alias": name, "ref": version.ref}, f"{key}@{name} = {version.ref}")


@app.command()
def path(ref: Ref, as_json: Json = False) -> None:
    """The directory that holds config.json or adapter_config.json."""
    version = _registry(writes=False).resolve(ref)
    output.answer(as_json, {"ref": version.ref, "path": str(version.path)}, str(version.path))


@app.command("rm")
def remove(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="key, key@3 or key@alias.")],
    every: Annotated[bool, typer.Option("--all", help="All versions of a key.")] = False,
    as_json: Json = False,
) -> None:
    """Delete versions; refused while an adapter, an alias or a running process needs one."""
    registry = _registry()
    removed = [gone for ref in refs for gone in registry.remove(ref, every=every)]
    output.answer(as_json, {"removed": removed}, *(f"removed {ref}" for ref in removed))


@app.command()
def verify(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="Without any: every version of every key.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Trust large files unchanged since they were added.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with what was recorded; exit 7 when something differs."""
    registry = _registry(writes=False)
    stored = [f"{entry.key}@{number}" for entry in registry.list() for number in entry.versions]
    good: list[str] = []
    bad: dict[str, str] = {}
    # A name that was typed must exist. Without names, every stored version that cannot be read is a finding.
    finding = VerificationError if refs else HarmonyError
    for ref in refs or stored:
        try:
            good.append(registry.verify(ref, quick=quick).ref)
        except finding as error:
            bad[ref] = error.message
    if bad:
        raise VerificationError(
            "\n".join(f"{ref}: {reason}" for ref, reason in bad.items()), verified=good, damaged=bad
        )
    output.answer(as_json, {"verified": good}, *(f"ok {ref}" for ref in good))
