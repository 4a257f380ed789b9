"""`adaptive run --resume [RUN]`: which run is meant, what it was started with, and what has changed since."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from harmony_core.config import Resolved, YamlDocument, as_yaml, load_yaml, places
from harmony_core.errors import HarmonyError, NotFoundError, UsageError, VerificationError
from harmony_core.home import Home
from harmony_core.recipe import Recipe, locate
from harmony_core.redaction import MASK, Redactor
from harmony_core.runs.checkpoint_files import Checkpoint, CheckpointStore
from harmony_core.runs.checkpoints import compare, differences, going_on
from harmony_core.runs.records import FILES, RunRecord, find_run, list_runs

from . import output
from .run import recipe_word

FLAG = "--resume"
NEWEST = "newest"


def with_resume(words: Sequence[str]) -> list[str]:
    """The words with a value behind every `--resume`, and with the run's recipe where none is named."""
    end = list(words).index("--") if "--" in words else len(words)
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
    reference = _reference(told)
    if reference and recipe_word(told, doubtful_too=False) is None and not {"-h", "--help"}.intersection(told):
        told.insert(told.index("run") + 1, str(find_resumable(Home.open(), reference).data["recipe"]))
    return told


def _reference(words: Sequence[str]) -> str:
    before = itertools.takewhile(lambda word: word != "--", words)
    return next((word.partition("=")[2] for word in before if word.startswith(f"{FLAG}=")), "")


def is_resumable(words: Sequence[str]) -> bool:
    """Whether words with a value behind `--resume` name a run that can go on."""
    with contextlib.suppress(HarmonyError):
        return bool(_reference(words) and find_resumable(Home.open(), _reference(words)))
    return False


def _is_recipe(word: str) -> bool:
    with contextlib.suppress(HarmonyError):
        return bool(locate(word))
    return False


def find_resumable(home: Home, reference: str, recipe: str | None = None) -> RunRecord:
    """The run that a reference means; `newest`: the newest one (of `recipe`) that can be resumed.

    Raises NotFoundError, ConflictError while it is alive, UsageError when it is of another recipe or nothing is left.
    """
    if reference != NEWEST:
        record = find_run(home, reference)
        record.require()
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
    if record.problem:
        return record.problem
    if record.status == "running":
        return "it is running"
    if not isinstance(record.data.get("recipe"), str):
        return "it does not say of which recipe it is"
    if record.status == "succeeded" and going_on(store, record.id, record.status) is None:
        return "it has ended well, and nothing is left to do"
    if not store.names():
        return "it has no checkpoint"
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
        record = find_resumable(Home.open(), reference, recipe.spec)
        record.require(*FILES)
        checkpoint = _store(record).newest_whole(output.tell)
        return cls(record, checkpoint, allow_change)

    def base(self, masked_from: Mapping[str, Any] | None = None) -> YamlDocument:
        """The configuration that the checkpoint was saved under; models as the versions that they meant then.

        Values that were masked as secrets are those of `masked_from`, or are left out.
        """
        data = deepcopy(self.checkpoint.state.get("config", {}))
        for place in masked(data):
            _fill(data, place, masked_from)
        try:
            for name, model in self.record.read("models.json").items():
                _pin(data, name.split("."), model["ref"])
        except (LookupError, TypeError, ValueError):
            where = f"run {self.record.id}: models.json"
            raise VerificationError(f"{where}: names {name!r}, which {self.checkpoint.name} lacks") from None
        return load_yaml(as_yaml(data), f"run {self.record.id}")

    def ask_for_masked(self, resolved: Resolved) -> None:
        """Raises UsageError naming the values that were masked as secrets and are not given anew."""
        given = {path for path, value in places(resolved.data) if value is not None}
        missing = [place for place in masked(self.checkpoint.state.get("config", {})) if place not in given]
        if missing:
            names = ", ".join(map(".".join, missing))
            variables = " ".join(f"ADAPTIVE_CFG__{'__'.join(place).upper()}=..." for place in missing)
            raise UsageError(
                f"run {self.record.id} does not keep secrets: it needs its {names} again",
                hint=f"set {variables}, or give a file with --config",
                missing=[".".join(place) for place in missing],
            )

    def check_machine(self, given: dict[str, Any]) -> None:
        """Raises UsageError when flags ask for another number of ranks, seed or device than the run has."""
        saved = self.checkpoint.state.get("run", {})
        asked = {"ranks": given["num_processes"], "seed": given["seed"], "device": given["device"]}
        asked = {name: value for name, value in asked.items() if value not in (None, "auto")}
        hint = "leave the flag out: a resumed run has what it was started with"
        compare(f"run {self.record.id}", {name: saved.get(name) for name in asked}, asked, hint)

    def check(self, recipe: Recipe, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """What has changed, one line each. Raises UsageError when there is something and it was not allowed."""
        mask = Redactor().knowing(before).knowing(now)
        changes = [mask.text(change) for change in differences(before, now)]
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


def masked(data: Any) -> list[tuple[str, ...]]:
    """The places whose values were masked as secrets; of a list the whole list."""
    return [
        tuple(map(str, path))
        for path, value in places(data)
        if not isinstance(value, dict)
        and not any(isinstance(key, int) for key in path)
        and any(isinstance(text, str) and MASK in text for _, text in places(value))
    ]


def _fill(data: dict[str, Any], place: tuple[str, ...], given: Mapping[str, Any] | None) -> None:
    """Put what is given at a place, or leave the place out."""
    for key in place[:-1]:
        data, given = data[key], None if given is None else given.get(key)
    if given is None:
        del data[place[-1]]
    else:
        data[place[-1]] = given.get(place[-1])


def _pin(data: Any, path: list[str], reference: str) -> None:
    """Put an exact version in the place of a model's key."""
    for key in path[:-1]:
        data = data[int(key)] if isinstance(data, list) else data[key]
    last: Any = int(path[-1]) if isinstance(data, list) else path[-1]
    if isinstance(data[last], dict):
        data[last]["model_key"] = reference
    else:
        data[last] = reference
