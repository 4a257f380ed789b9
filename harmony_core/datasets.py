"""Datasets: JSONL files as threads, and the shuffled iterator that training takes samples from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from harmony_core.dataset_kinds import Format
from harmony_core.dataset_lines import Layout, Line, kind_of, layout_of, parse, thread_of
from harmony_core.errors import DataError, NotFoundError, ResourceError, did_you_mean
from harmony_core.threads import StringThread

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_REPORTED = 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

T = TypeVar("T")


def load_threads(path: Path, kind: Format | None = None, feedback_key: str | None = None) -> list[StringThread]:
    """Every line of a JSONL file as a thread.

    The first usable line decides between the two formats and, where no `kind` is given, which kind all lines must be.
    A byte order mark, CRLF and blank lines are accepted. Raises DataError with one `path:line: reason` for each bad
    line (the first 20), NotFoundError for a file that is not there.
    """
    reader = _Reader(kind, feedback_key)
    problems: list[str] = []
    threads: list[StringThread] = []
    for number, data in _lines(path):
        try:
            if len(data) > MAX_LINE_BYTES:
                raise DataError(f"longer than {MAX_LINE_BYTES} bytes; not read further")
            threads.append(reader.read(number, parse(data)))
        except DataError as error:
            problems.append(f"{path}:{number}: {error.message}")
            if len(problems) == MAX_REPORTED:
                problems.append(f"{path}: not read further")
                break
    if problems:
        raise DataError("\n".join(problems), path=str(path))
    if not threads:
        raise DataError(f"{path}: has no line with a sample", path=str(path))
    return threads


class _Reader:
    """Reads lines, holding what the first one decided."""

    def __init__(self, kind: Format | None, feedback_key: str | None) -> None:
        self._kind = kind
        self._feedback_key = feedback_key
        self._first: tuple[int, Layout, Format] | None = None

    def read(self, number: int, line: Line) -> StringThread:
        layout = layout_of(line)
        kind = self._kind or kind_of(line, layout)
        if self._first is not None:
            first, first_layout, first_kind = self._first
            if layout != first_layout:
                raise DataError(f"is in the {layout} format, line {first} in the {first_layout} one")
            # A completion that also has feedbacks serves as one.
            if kind != first_kind and (first_kind, kind) != ("completions", "feedbacks"):
                raise DataError(f"has the fields of {kind}, line {first} those of {first_kind}")
            kind = first_kind
        thread = thread_of(line, layout, kind, self._feedback_key)
        self._first = self._first or (number, layout, kind)
        return thread


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1, without their ends, up to one that is too long."""
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES:
                    yield number, data
                    return
                text = data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data
                if text.strip():
                    yield number, text.strip(b"\r\n")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.jsonl")]
        raise NotFoundError(f"there is no dataset file {path}", hint=did_you_mean(path.name, siblings)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


class DataSet(Generic[T]):
    """An iterator over samples in a seeded random order, shuffled from the first pass on.

    `idx` counts the samples handed out. With `allow_looping` every further pass is another permutation of the same
    generator. A sample whose metadata is a dict gets its count as `metadata["sample_index"]`.
    """

    def __init__(self, threads: Sequence[T], allow_looping: bool = False, seed: int = 42) -> None:
        import numpy as np  # 0.1 s, which a command that only reads configuration does not pay

        self.threads = threads
        self.allow_looping = allow_looping
        self.seed = seed
        self.idx = 0
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
            metadata["sample_index"] = self.idx
        self.idx += 1
        return sample

    def completion_percentage(self) -> float:
        """Samples handed out over samples there are: above 1 after the first pass."""
        return self.idx / len(self.threads) if self.threads else 1.0

    def reset(self) -> None:
        """Begin again with the first sample of the first pass."""
        self.idx = 0

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands, as plain numbers for a checkpoint."""
        passes = len(self.access_indices) // max(len(self.threads), 1)
        return {"idx": self.idx, "seed": self.seed, "length": len(self.threads), "passes": passes}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue where `get_state` was called. Raises DataError for the state of another dataset."""
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
            turns = [(turn[role_key], turn[content_key]) for turn in raw]
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"a sample has no turns of the expected shape: {error!r}") from None
        if any(not isinstance(part, str) for turn in turns for part in turn):
            raise DataError(f"'{role_key}' and '{content_key}' of a turn must be text")
        while trim_final_assistant_turns and turns and turns[-1][0] == "assistant":
            turns.pop()
        rest = {} if turns_key is None else {key: value for key, value in sample.items() if key != turns_key}
        return StringThread(turns, rest)

    return convert


def load_from_hf(repo: str, split: str, convert_sample_fn: Callable[..., StringThread]) -> list[StringThread]:
    """Every sample of a split of a Hugging Face dataset. Raises ResourceError without the `datasets` package."""
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ResourceError("load_from_hf needs the datasets package", hint="pip install datasets") from None
    return [convert_sample_fn(sample) for sample in library.load_dataset(repo, split=split)]
