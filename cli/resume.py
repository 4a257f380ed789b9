"""`adaptive run --resume [RUN]`: which run is meant, what it was started with, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony_core.checkpoint_files import Checkpoint, CheckpointStore
from harmony_core.checkpoints import compare, differences, going_on
from harmony_core.config import YamlDocument, load_yaml
from harmony_core.config.snapshot import as_yaml
from harmony_core.errors import HarmonyError, NotFoundError, UsageError
from harmony_core.home import Home
from harmony_core.recipe import Recipe, built_in_recipes, locate
from harmony_core.redaction import MASK
from harmony_core.run import RunRecord, find_run, list_runs

from . import output
from .words import recipe_word

FLAG = "--resume"
NEWEST = "newest"


def spec_of(recipe: Recipe) -> str:
    """What names the recipe on a command line, from any directory."""
    if built_in_recipes().get(recipe.path.stem) == recipe.path:
        return recipe.path.stem
    return f"{recipe.path}:{recipe.main.__name__}"


def with_resume(words: Sequence[str]) -> list[str]:
    """The words with a value behind every `--resume`, and with the run's recipe where none is named."""
    end = list(words).index("--") if "--" in words else len(words)
    if not any(word.partition("=")[0] == FLAG for word in words[:end]):
        return list(words)
    told: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == FLAG and len(words) - len(pending) <= end:
            behind = pending[0] if pending and not pending[0].startswith("-") else None
            named = recipe_word([*told, *pending[1:]], doubtful_too=False) is not None
            if behind is not None and (named or not _is_recipe(behind)):
                word = f"{FLAG}={pending.pop(0)}"
            else:
                word = f"{FLAG}={NEWEST}"
        told.append(word)
    if recipe_word(told, doubtful_too=False) is None and not {"-h", "--help"}.intersection(told):
        reference = next(word for word in told if word.startswith(f"{FLAG}=")).partition("=")[2]
        record = find_resumable(Home.open(), reference)
        told.insert(told.index("run") + 1, str(record.data["recipe"]))
    return told


def _is_recipe(word: str) -> bool:
    try:
        locate(word)
    except HarmonyError:
        return False
    return True


def find_resumable(home: Home, reference: str, recipe: str | None = None) -> RunRecord:
    """The run that a reference means; `newest`: the newest one (of `recipe`) that can be resumed.

    Raises NotFoundError, ConflictError while it is alive, UsageError when it is of another recipe or nothing is left.
    """
    if reference != NEWEST:
        record = find_run(home, reference)
        if recipe is not None and record.data.get("recipe") != recipe:
            raise UsageError(f"run {record.id} is of the recipe {record.data.get('recipe')}, not {recipe}")
        reason = why_not(record)
        if reason:
            raise UsageError(f"run {record.id} cannot be resumed: {reason}", hint="start a new run")
        return record
    records = [r for r in list_runs(home) if recipe is None or r.data.get("recipe") == recipe]
    found = next((record for record in records if why_not(record) is None), None)
    if found is not None:
        return found
    of = f" of {recipe}" if recipe else ""
    told = f"; the newest, {records[0].id}: {why_not(records[0])}" if records else ""
    raise NotFoundError(f"no run{of} can be resumed{told}", hint="adaptive runs list shows all of them")


def why_not(record: RunRecord) -> str | None:
    """Why a run cannot be resumed; None when it can."""
    store = _store(record)
    if record.status == "running":
        return "it is running"
    if not isinstance(record.data.get("recipe"), str):
        return "it does not say of which recipe it is"
    if not store.names():
        return "it has no checkpoint"
    if record.status == "succeeded" and going_on(store, record.id, record.status) is None:
        return "it has ended well, and nothing is left to do"
    return None


def where_it_goes_on(record: RunRecord) -> dict[str, Any] | None:
    """From where and how a run can be resumed, as plain data; None when it cannot."""
    return going_on(_store(record), record.id, record.status) if why_not(record) is None else None


def _store(record: RunRecord) -> CheckpointStore:
    return CheckpointStore(record.directory / "checkpoints")


@dataclass(frozen=True)
class Resumption:
    """A run that is to be continued, and the checkpoint that it continues from."""

    record: RunRecord
    checkpoint: Checkpoint
    allow_change: bool

    @classmethod
    def find(cls, reference: str, recipe: Recipe, allow_change: bool) -> Resumption:
        """Raises NotFoundError, UsageError, ConflictError, and VerificationError when no checkpoint is whole."""
        record = find_resumable(Home.open(), reference, spec_of(recipe))
        checkpoint = _store(record).newest_whole(output.tell)
        return cls(record, checkpoint, allow_change)

    def base(self) -> YamlDocument:
        """The configuration that the checkpoint was saved under; models as the versions that they meant then.

        Values that were masked as secrets are left out: they come from where they came from before.
        """
        data = _unmasked(self.checkpoint.state["config"])
        for name, model in json.loads((self.record.directory / "models.json").read_text(encoding="utf-8")).items():
            _pin(data, name.split("."), model["ref"])
        return load_yaml(as_yaml(data), f"run {self.record.id}")

    def values(self, given: dict[str, Any]) -> dict[str, Any]:
        """The runner's values: those given now, else those that the run was started with."""
        saved = self.record.data.get("options", {})
        merged = dict(given)
        for name in ("num_processes", "seed", "accelerate_config", "memory", "keep_checkpoints"):
            if merged[name] is None and saved.get(name) is not None:
                merged[name] = str(saved[name]) if name == "memory" else saved[name]
        if saved.get("accelerate_config"):
            merged["accelerate_config"] = Path(merged["accelerate_config"])
            merged["num_processes"] = given["num_processes"]
        if merged["device"] == "auto":
            merged["device"] = saved.get("device", "auto")
        for name in ("rehearse", "deterministic"):
            merged[name] = merged[name] or bool(saved.get(name))
        merged["no_compile"] = merged["no_compile"] or saved.get("compile") is False
        return merged

    def check_machine(self, given: dict[str, Any]) -> None:
        """Raises UsageError when flags ask for another number of ranks, seed or device than the run has."""
        saved = self.checkpoint.state["run"]
        asked = {"ranks": given["num_processes"], "seed": given["seed"], "device": given["device"]}
        asked = {name: value for name, value in asked.items() if value not in (None, "auto")}
        hint = "leave the flag out: a resumed run has what it was started with"
        compare(f"run {self.record.id}", {name: saved[name] for name in asked}, asked, hint)

    def check(self, recipe: Recipe, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """What has changed, one line each. Raises UsageError when there is something and it was not allowed."""
        changes = differences(before, now)
        if self.record.data.get("recipe_sha256") not in (None, recipe.sha256):
            changes.append(f"the recipe's file {recipe.path.name} has changed since")
        if changes and not self.allow_change:
            raise UsageError(
                f"run {self.record.id} was started with another configuration: {'; '.join(changes)}",
                hint="resume without these changes; --allow-change accepts those that do not decide the training",
                changes=changes,
            )
        for change in changes:
            output.tell(f"changed: {change}")
        return changes


def _unmasked(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _unmasked(value) for key, value in data.items() if not _is_masked(value)}
    return [_unmasked(value) for value in data] if isinstance(data, list) else data


def _is_masked(value: Any) -> bool:
    return isinstance(value, str) and MASK in value


def _pin(data: Any, path: list[str], reference: str) -> None:
    """Put an exact version in the place of a model's key."""
    for key in path[:-1]:
        data = data[int(key)] if isinstance(data, list) else data[key]
    last: Any = int(path[-1]) if isinstance(data, list) else path[-1]
    if isinstance(data[last], dict):
        data[last]["model_key"] = reference
    else:
        data[last] = reference
