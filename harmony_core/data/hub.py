"""Datasets of the Hugging Face hub, `hf:owner/name[@revision][:config][:split]`, by the `datasets` library.

What a revision means is asked once and noted in the home, beside the files of that commit: a later run reads the same
rows, and needs no network. The library reads the files as data; it runs no code of a dataset.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harmony_core.data.files import SUFFIXES
from harmony_core.data.tables import numbered
from harmony_core.errors import DataError, NotFoundError, ResourceError, UsageError, VerificationError, did_you_mean
from harmony_core.home import Home
from harmony_core.plain_files import read_json, write_json
from harmony_core.registry.sources import hub_errors

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_SOURCE = re.compile(rf"hf:({_PART}/{_PART})(?:@([\w./-]{{1,200}}))?(?::([\w.-]+))?(?::([\w.-]+))?")


def is_hub_name(source: object) -> bool:
    """Whether a dataset's name means one of the hub."""
    return isinstance(source, str) and source.startswith("hf:")


def check_hub_name(source: str) -> re.Match[str]:
    """The parts of a name. Raises UsageError, and ResourceError without the library."""
    match = _SOURCE.fullmatch(source)
    if not match:
        raise UsageError(f"{source[:200]!r} is no dataset of the hub", hint="hf:owner/name[@revision][:config][:split]")
    if importlib.util.find_spec("datasets") is None:
        raise ResourceError(f"{source} needs the datasets package", hint="pip install 'harmony-core[data]'")
    return match


def hub_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split by their number from 1.

    Raises NotFoundError, DataError, UsageError, ResourceError (network, offline, disk).
    """
    name, revision, first, second = check_hub_name(source).groups()
    home = Home.open().path / "datasets"
    pin = _pinned(home, source, name, revision, first, second)
    split = second or (first if first != pin["config"] else None)
    library = importlib.import_module("datasets")
    library.disable_progress_bars()
    try:
        named = {"data_files": pin["files"]} if pin["files"] else {"name": pin["config"]}
        splits = library.load_dataset(str(home / pin["directory"]), **named, cache_dir=str(home / "tables"))
    except (library.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{source}: cannot be read: {(str(error).splitlines() or [''])[0][:300]}") from error
    if split is None and len(splits) > 1:
        raise NotFoundError(f"{source} has several splits: {', '.join(splits)}", hint=f"{source}:{next(iter(splits))}")
    if split is not None and split not in splits:
        raise NotFoundError(f"{source} has no split '{split}'", hint=did_you_mean(split, splits))
    return numbered(splits[split or next(iter(splits))].data.to_batches())


def _pinned(
    home: Path, source: str, name: str, revision: str | None, first: str | None, second: str | None
) -> dict[str, Any]:
    """Directory, config and its files by split; fetched when this is asked for the first time."""
    from huggingface_hub import DatasetCard, HfApi

    note = home / "pins" / f"{name}@{revision or 'main'}.json".replace("/", "--")
    known: dict[str, Any] = read_json(note) if note.is_file() else {"parts": {}}
    asked = ":".join(part for part in (first, second and "*") if part)
    pin: dict[str, Any] = known["parts"].get(asked)
    if pin and (home / pin["directory"]).is_dir():
        return pin
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub_errors(name, revision, "dataset"):
        info = api.dataset_info(name, revision=known.get("commit", revision))
        where: dict[str, Any] = {"repo_type": "dataset", "revision": info.sha, "cache_dir": home / "files"}
        configs = []
        if any(sibling.rfilename == "README.md" for sibling in info.siblings or ()):
            card = DatasetCard.load(Path(api.hf_hub_download(name, "README.md", **where)), ignore_metadata_errors=True)
            configs = [config for config in _listed(card.data.get("configs") or []) if isinstance(config, dict)]
        paths = [path for config in configs for files in _files_of(config).values() for path in files]
        paths += [str(config.get("data_dir", "")) for config in configs]
        if outside := [path for path in paths if path.startswith("/") or ".." in path or ":" in path]:
            raise VerificationError(f"{source}: its card names {outside[0][:80]!r}, which is no file of the dataset")
        config = _config_of(configs, source, first, second)
        files = _files_of(config)
        wanted = [path for paths in files.values() for path in paths] or [f"*{suffix}*" for suffix in SUFFIXES]
        directory = Path(api.snapshot_download(name, allow_patterns=["README.md", *wanted], **where))
    pin = {"directory": str(directory.relative_to(home)), "config": config.get("config_name"), "files": files}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"commit": info.sha, "parts": known["parts"] | {asked: pin}})
    return pin


def _config_of(configs: list[dict[str, Any]], source: str, first: str | None, second: str | None) -> dict[str, Any]:
    """The config of a dataset's card that is asked for; {} where there are none. Raises NotFoundError."""
    by_name = {str(config.get("config_name")): config for config in configs}
    if first in by_name:
        return by_name[str(first)]
    if second is not None and first != "default":
        raise NotFoundError(f"{source} has no config '{first}'", hint=did_you_mean(str(first), by_name))
    usual = [config for config in configs if len(configs) == 1 or config.get("default")] or [by_name.get("default", {})]
    if configs and not usual[0]:
        names = list(by_name)
        raise NotFoundError(f"{source} has several configs: {', '.join(names)}", hint=f"name one, as in ...:{names[0]}")
    return usual[0]


def _files_of(config: dict[str, Any]) -> dict[str, list[str]]:
    """The files of each split, as a card names them; {} where it does not."""
    splits: dict[str, list[str]] = {}
    for file in _listed(config.get("data_files") or []):
        entry = file if isinstance(file, dict) else {"path": file}
        splits.setdefault(str(entry.get("split", "train")), []).extend(map(str, _listed(entry.get("path"))))
    return splits


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
