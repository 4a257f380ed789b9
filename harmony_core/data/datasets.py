"""Datasets: the rows of files and of the Hugging Face hub as threads, and the shuffled iterator that training reads.

A dataset of the hub (`hf:owner/name[@revision][:config][:split]`) is read by the `datasets` library, which treats its
files as data and does not run their code. The commit of a revision is looked up once and recorded in the home, beside
the files of that commit, so that later runs read the same rows without network access.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from harmony_core.data import Format, files as dataset_files
from harmony_core.data.columns import Line, Reading, check_columns
from harmony_core.data.files import SUFFIXES, RowFile, Threads, as_lines, numbered, open_rows, paths_of
from harmony_core.data.messages import json_type, read_messages
from harmony_core.data.shapes import read_row, thread_of
from harmony_core.errors import DataError, NotFoundError, ResourceError, UsageError, VerificationError, did_you_mean
from harmony_core.home import Home
from harmony_core.plain_files import read_json, write_json
from harmony_core.registry.sources import hub_errors
from harmony_core.text.row_lengths import Drops
from harmony_core.text.threads import StringThread

log = logging.getLogger(__name__)

MAX_REPORTED = 20
HELD_ROWS = 50_000
"""A dataset of more rows, or more than `HELD_BYTES` of text, is not held in memory."""
HELD_BYTES = 64 * 1024 * 1024

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_SOURCE = re.compile(rf"hf:({_PART}/{_PART})(?:@([\w./-]{{1,200}}))?(?::([\w.-]+))?(?::([\w.-]+))?")

T = TypeVar("T")


def load_threads(
    source: Path | str,
    kind: Format | None = None,
    feedback_key: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    max_refused: int = 0,
) -> Sequence[StringThread]:
    """Load every row of a file, of a directory's files, or of a dataset of the hub (`hf:...`) as a thread.

    All rows are read once, and must have the shape and kind of the first row. Returns a list, or for a large dataset a
    sequence that reads each thread on access. Up to `max_refused` bad rows are left out; more raise a DataError with
    one `path:number: reason` for each of the first 20. Also raises NotFoundError and ResourceError.
    """
    reading = Reading(kind, feedback_key, columns or {}, roles or {})
    check_columns(reading.columns)
    loading = _Loading(reading, max_refused)
    if is_hub_name(source):
        loading.add(as_lines(str(source), hub_rows(str(source))))
    else:
        all(loading.add(open_rows(path)) for path in paths_of(Path(source)))
    problems = "\n".join(loading.problems)
    if loading.refused > max_refused:
        raise DataError(problems, path=str(source))
    if problems:
        log.warning("%d rows are left out (max_refused is %d):\n%s", loading.refused, max_refused, problems)
    if not loading.offsets:
        raise DataError(f"{source}: has no line with a sample", path=str(source))
    return loading.threads if loading.threads is not None else loading.large()


class _Loading:
    """Reads every row once. Keeps the first row's shape, the place of each row, and the threads of a small dataset."""

    def __init__(self, reading: Reading, max_refused: int) -> None:
        self._reading = reading
        self._most_shown = max(max_refused + 1, MAX_REPORTED)
        self._first: tuple[int, str, Format] | None = None
        self._is_plain: Callable[[bytes], bool] | None = None
        self._files: list[RowFile] = []
        self._starts: list[int] = []
        self._digest, self._bytes = hashlib.sha256(repr(reading).encode()), 0
        self.offsets = array("q")
        self.threads: list[StringThread] | None = []
        self.problems: list[str] = []
        self.refused = 0

    def add(self, file: RowFile) -> bool:
        """Read a file's rows. Returns whether to continue."""
        self._files.append(file)
        self._starts.append(len(self.offsets))
        for number, offset, data in file:
            try:
                thread = self._read(number, data)
            except DataError as error:
                self.refused += 1
                self.problems.append(f"{file.origin}:{number}: {error.message}")
                if self.refused == self._most_shown:
                    self.problems.append(f"{file.origin}: not read further")
                    return False
                continue
            self.offsets.append(offset)
            self._digest.update(data)
            self._bytes += len(data)
            if self.threads is not None and thread is not None:
                self.threads.append(thread)
            if len(self.offsets) > HELD_ROWS or self._bytes > HELD_BYTES:
                self.threads = None
        return True

    def large(self) -> Threads:
        """The threads of the files, each read on access."""
        return Threads(self._files, self._starts, self.offsets, self._again, self._digest.hexdigest())

    def _again(self, data: bytes) -> StringThread:
        return read_row(_parse(data), self._reading).thread

    def _read(self, number: int, data: bytes) -> StringThread | None:
        """The row's thread, or None if the row is not held in memory and passes the quick check of `_plain_rows`."""
        if len(data) > dataset_files.MAX_LINE_BYTES:
            raise DataError(f"longer than {dataset_files.MAX_LINE_BYTES} bytes; not read further")
        if self.threads is None and self._is_plain is not None and self._is_plain(data):
            return None
        line = _parse(data)
        thread, shape, kind = read_row(line, self._reading)
        if self._first is None:
            self._first = number, shape, kind
            self._is_plain = _plain_rows(line, shape, kind, self._reading)
        first, first_shape, first_kind = self._first
        if shape != first_shape:
            raise DataError(f"has the shape {shape}, row {first} the shape {first_shape}")
        # A row with feedbacks is also valid in a dataset of completions.
        if kind != first_kind and (first_kind, kind) != ("completions", "feedbacks"):
            raise DataError(f"has the fields of {kind}, row {first} those of {first_kind}")
        return thread


def _parse(data: bytes) -> Line:
    try:
        line = msgspec.json.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start + 1}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    if not isinstance(line, dict):
        raise DataError(f"must be one JSON object, not {json_type(line)}")
    return line


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Shared(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "human", "user", "gpt", "assistant"] = msgspec.field(name="from")
    content: str = msgspec.field(name="value")


_SHAPES: dict[str, Any] = {"messages": list[_Message], "ShareGPT": list[_Shared]}
_LAST = {"completions": ("assistant", "gpt"), "prompts": ("user", "human")}


def _plain_rows(line: Line, shape: str, kind: Format, reading: Reading) -> Callable[[bytes], bool] | None:
    """A quick check of a row's JSON: true only for rows that can be read and have the shape and kind of this row.

    Most rows of a large file are lists of plain messages: these are checked while they are decoded. Other rows fail
    the check and are read in full. Returns None if it needs more than the messages: another column or a feedback.
    """
    plan = reading.plan(line)
    if shape not in _SHAPES or len(plan["messages"]) != 1 or sum(map(len, plan.values())) != 1 or reading.roles:
        return None
    if reading.feedback_key is not None or (reading.kind or "completions") != kind or kind not in _LAST:
        return None
    ((_, column),) = plan["messages"]
    others = {f"column_{i}": name for i, name in enumerate(line) if name != column}
    fields: list[Any] = [("messages", _SHAPES[shape]), *((field, Any, None) for field in others)]
    try:
        row = msgspec.defstruct("Row", fields, rename={"messages": column} | others, forbid_unknown_fields=True)
    except ValueError:  # msgspec refuses the column's name as a field: it has quotes or control characters
        return None
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(row).decode
    last = _LAST[kind]

    def is_plain(data: bytes) -> bool:
        try:
            messages = decode(data).messages
        except (msgspec.DecodeError, RecursionError):
            return False
        if not messages or messages[-1].role not in last:
            return False
        return not any("<" in message.content for message in messages)  # markers of pictures begin with it

    return is_plain


class DataSet(Generic[T]):
    """An iterator over samples in a seeded random order, shuffled from the first pass on.

    `idx` counts the samples handed out. With `allow_looping` every further pass is another permutation of the same
    generator. A sample whose metadata is a dict gets its count as `metadata["sample_index"]`.
    """

    def __init__(self, threads: Sequence[T], allow_looping: bool = False, seed: int = 42) -> None:
        import numpy as np  # takes 0.1 s, which a command that only reads configuration saves

        self.threads = threads
        self.allow_looping = allow_looping
        self.seed = seed
        self.idx = 0
        self.drops = Drops()
        """Counts of samples that training classes dropped, by reason."""
        self.rng = np.random.default_rng(seed)
        self.access_indices: list[int] = self.rng.permutation(len(threads)).tolist()

    def __iter__(self) -> DataSet[T]:
        return self

    def __len__(self) -> int:
        return len(self.threads)

    def __getitem__(self, x: Any) -> Any:
        return self.threads[x]

    def __next__(self) -> T:
        if self.idx >= len(self.access_indices):
            if not self.allow_looping or not self.threads:
                raise StopIteration
            self._shuffle_again()
        sample = self.threads[self.access_indices[self.idx]]
        metadata = getattr(sample, "metadata", None)
        if isinstance(metadata, dict):
            dict.__setitem__(metadata, "sample_index", self.idx)  # not a change that a large dataset has to keep
        self.idx += 1
        return sample

    def completion_percentage(self) -> float:
        """Samples handed out divided by the number of samples; above 1 after the first pass."""
        return self.idx / len(self.threads) if self.threads else 1.0

    def reset(self) -> None:
        """Restart at the first sample of the first pass."""
        self.idx = 0

    def get_state(self) -> dict[str, int]:
        """The iterator's position as plain numbers, for a checkpoint."""
        passes = len(self.access_indices) // max(len(self.threads), 1)
        return {"idx": self.idx, "seed": self.seed, "length": len(self.threads), "passes": passes}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue from the result of `get_state`. Raises DataError for the state of another dataset."""
        if state["length"] != len(self.threads):
            raise DataError(f"the state is of {state['length']} samples, the dataset has {len(self.threads)}")
        fresh = DataSet(self.threads, self.allow_looping, state["seed"])
        for _ in range(1, state["passes"]):
            fresh._shuffle_again()
        self.seed, self.rng, self.access_indices, self.idx = fresh.seed, fresh.rng, fresh.access_indices, state["idx"]

    def _shuffle_again(self) -> None:
        self.access_indices += self.rng.permutation(len(self.threads)).tolist()


def convert_sample_dict(
    turns_key: str | None = "messages",
    role_key: str = "role",
    content_key: str = "content",
    trim_final_assistant_turns: bool = False,
) -> Callable[[Any], StringThread]:
    """A function from a sample (a dict, or with `turns_key=None` its list of turns) to a thread.

    The thread has the constructor's weights and the sample's other fields as metadata. Raises DataError.
    """

    def convert(sample: Any) -> StringThread:
        try:
            raw = sample if turns_key is None else sample[turns_key]
            turns = [
                {"role": turn[role_key], "content": turn[content_key]}
                | {name: value for name, value in turn.items() if name not in (role_key, content_key)}
                for turn in raw
            ]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"a sample has no turns of the expected shape: {error!r}") from None
        parsed = read_messages(turns, turns_key or "turns", {})
        while trim_final_assistant_turns and parsed and parsed[-1].turn.role == "assistant":
            parsed.pop()
        rest = {} if turns_key is None else {key: value for key, value in sample.items() if key != turns_key}
        return thread_of(parsed, 1.0, rest)

    return convert


def load_from_hf(repo: str, split: str, convert_sample_fn: Callable[..., StringThread]) -> list[StringThread]:
    """Every sample of a split of a Hugging Face dataset. Raises ResourceError without the `datasets` package."""
    return [convert_sample_fn(sample) for _, sample in hub_rows(f"hf:{repo}:{split}")]


def is_hub_name(source: object) -> bool:
    """Whether a name refers to a dataset of the hub."""
    return isinstance(source, str) and source.startswith("hf:")


def check_hub_name(source: str) -> re.Match[str]:
    """The parts of a hub name. Raises UsageError, and ResourceError without the library."""
    if not (match := _SOURCE.fullmatch(source)):
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
    """The directory, the config and its files by split; the first call fetches them."""
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
    """The requested config of a dataset's card; {} for a card without configs. Raises NotFoundError."""
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
    """The files of each split that a card names; {} if it names no files."""
    splits: dict[str, list[str]] = {}
    for file in _listed(config.get("data_files") or []):
        entry = file if isinstance(file, dict) else {"path": file}
        splits.setdefault(str(entry.get("split", "train")), []).extend(map(str, _listed(entry.get("path"))))
    return splits


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
