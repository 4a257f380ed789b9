"""Files of rows: JSON lines, CSV, Parquet and Arrow (by pyarrow), each optionally gzipped.

JSON lines are read where they are. Other formats are first written as JSON lines into an unnamed temporary file, so
that any row can be read again without holding the rows in memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import importlib
import io
import mmap
import os
import re
import tempfile
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import msgspec

from harmony_core.data.columns import Line
from harmony_core.errors import DataError, NotFoundError, ResourceError, did_you_mean, storing
from harmony_core.home import Home
from harmony_core.text.threads import StringThread

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_UNPACKED_RATIO = 200
"""Text compresses to about a tenth. Above `LEAST_UNPACKED_BYTES`, a file that grows by a larger factor is refused."""
LEAST_UNPACKED_BYTES = 1024**3
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".feather")
_OTHER_SUFFIXES = ("", ".md", ".py", ".yaml", ".yml", ".lock")
"""Suffixes of other files that may be beside data."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[-_.\d])", re.IGNORECASE)
_PACKED = {b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"PK\x03\x04": "unzip"}
_READ_BYTES = 16 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 256
_MAX_GROUP_BYTES = 8 * 1024**3
"""The maximum size that a file may declare for a row group, which is unpacked as a whole."""

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Rows by their number from 1."""


def csv_rows(file: IO[bytes], origin: str, separator: str, limit: int) -> Rows:
    """All cells are text; an empty one is null. The number is the line on which the row ends. Raises DataError."""
    csv.field_size_limit(limit)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{origin}:1: two columns have one name")
        for cells in reader:
            if len(cells) > len(names) or (cells and len(cells) < len(names)):
                raise DataError(f"{origin}:{reader.line_num}: has {len(cells)} cells for {len(names)} columns")
            if cells:
                yield reader.line_num, dict(zip(names, (cell or None for cell in cells), strict=True))
    except csv.Error as error:
        raise DataError(f"{origin}:{reader.line_num}: not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}:{reader.line_num}: not UTF-8: {error.reason}") from None
    finally:
        text.detach()  # the file is the caller's to close


def table_rows(file: IO[bytes], origin: str) -> Rows:
    """The rows of a Parquet file, an Arrow file (mapped into memory) or an Arrow stream.

    Raises DataError, and ResourceError without pyarrow.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ResourceError("Parquet and Arrow files need pyarrow", hint="pip install 'harmony-core[data]'") from None
    head = file.read(6)
    file.seek(0)
    format = "Parquet" if head.startswith(b"PAR1") else "Arrow"
    try:
        source = arrow.memory_map(origin) if format == "Arrow" and file.name == origin else file
        if format == "Parquet":
            table = parquet.ParquetFile(source)
            groups = (table.metadata.row_group(index) for index in range(table.num_row_groups))
            if any(group.total_byte_size > _MAX_GROUP_BYTES for group in groups):
                raise DataError(f"{origin}: has a row group of more than {_MAX_GROUP_BYTES} bytes: write smaller ones")
            batches = table.iter_batches(batch_size=_BATCH_ROWS)
        elif head == b"ARROW1":
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(arrow.ipc.open_stream(source))
        yield from numbered(batches)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{origin}: not {format}, or damaged: {str(error).splitlines()[0][:200]}") from None


def numbered(batches: Iterable[Any]) -> Rows:
    """The rows of Arrow batches, without nulls inside objects: in a table every object has the fields of all."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file's offsets may point anywhere
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield number, {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class RowFile:
    """Lines of JSON. Iteration yields number, offset and text of each line that is not blank; `read` rereads one."""

    def __init__(self, origin: str, file: IO[bytes]) -> None:
        self.origin = origin
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = self._changed()

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        number = offset = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                text = data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data
                if text.strip():
                    yield number, offset, text.rstrip(b"\r\n")
                if len(data) > MAX_LINE_BYTES:
                    return
                offset += len(data)

    def read(self, offset: int) -> bytes:
        """The line that begins at an offset. Raises DataError if the file has changed since."""
        if self._changed() != self._stamp:
            raise DataError(f"{self.origin}: was changed while it was in use")
        data = os.pread(self._descriptor, _READ_BYTES, offset)
        while b"\n" not in data and (more := os.pread(self._descriptor, len(data), offset + len(data))):
            data += more
        return data.partition(b"\n")[0].removeprefix(_BYTE_ORDER_MARK if offset == 0 else b"")

    def _changed(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns


def paths_of(path: Path) -> list[Path]:
    """The files of a path: the file itself, those below a directory, or those that match a pattern with `*`.

    Raises NotFoundError; DataError for a directory of several splits, or one with unsupported files.
    """
    if not path.exists():
        if found := sorted(path.parent.glob(path.name)) if "*" in path.name else []:
            return found
        siblings = [p.name for p in path.parent.glob("*") if p.name.endswith((*SUFFIXES, ".gz"))]
        raise NotFoundError(f"there is no dataset file {path}", hint=did_you_mean(path.name, siblings))
    if not path.is_dir():
        return [path]
    files = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or name.startswith(".") or "/." in name or file.name in _NOT_ROWS:
            continue
        if _suffix(file) in SUFFIXES:
            files.append(file)
        elif file.suffix.lower() not in _OTHER_SUFFIXES:
            raise DataError(f"{path}: holds {name}, which is no file of rows: name the others, as in {path}/*.parquet")
    if not files:
        raise DataError(f"{path}: holds no file of rows ({', '.join(SUFFIXES)})")
    splits = {split.group(1).lower() if (split := _split_of(file, path)) else "": file for file in files}
    if len(splits) > 1:
        names = ", ".join(sorted(splits)).strip(", ")
        raise DataError(f"{path}: holds several splits ({names}): name the files of one, as in {path}/train*")
    return files


def _split_of(file: Path, root: Path) -> re.Match[str] | None:
    return next(filter(None, map(_SPLIT.match, reversed(file.relative_to(root).parts))), None)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_rows(path: Path) -> RowFile:
    """The rows of a file. Its first bytes and its suffix decide the format. Raises DataError, ResourceError."""
    if not path.is_file():
        raise DataError(f"{path}: is neither a file nor a directory")
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
            if file.read(2) == b"\x1f\x8b":
                file = stack.enter_context(_unpacked(path))
            return _rows_of(file, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _rows_of(file: IO[bytes], path: Path) -> RowFile:
    origin, suffix = str(path), _suffix(path)
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    for magic, command in _PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: is compressed in a way that is not read (gzip is): {command} {path.name}")
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        rows: Iterable[tuple[int, Any]] = table_rows(file, origin)
    elif suffix in (".csv", ".tsv"):
        rows = csv_rows(file, origin, "\t" if suffix == ".tsv" else ",", MAX_LINE_BYTES)
    elif _is_array(file, path):
        rows = _items(file, origin)
    else:
        return RowFile(origin, file)
    return as_lines(origin, rows)


def as_lines(origin: str, rows: Iterable[tuple[int, Any]]) -> RowFile:
    """Numbered rows (objects, or their JSON) written as lines: row n stands on line n. Raises ResourceError."""
    line, encode = 1, msgspec.json.Encoder().encode
    with _nameless() as file:
        with storing(f"cannot unpack {origin}"):
            for number, row in rows:
                file.write(b"\n" * (number - line))
                file.write(row.replace(b"\n", b" ").replace(b"\r", b" ") if isinstance(row, bytes) else encode(row))
                line = number
            file.write(b"\n")
            file.flush()
        return RowFile(origin, file)


def _nameless() -> IO[bytes]:
    """An unnamed file on the home's disk, because the system's temporary folder may be in memory."""
    return tempfile.TemporaryFile(dir=Home.open().cache)


def _unpacked(path: Path) -> IO[bytes]:
    limit = max(path.stat().st_size * MAX_UNPACKED_RATIO, LEAST_UNPACKED_BYTES)
    with contextlib.ExitStack() as stack:
        file, size = stack.enter_context(_nameless()), 0
        try:
            with gzip.open(path) as packed:
                while chunk := packed.read(1 << 20):
                    size += len(chunk)
                    if size > limit:
                        raise DataError(f"{path}: unpacks to more than {limit} bytes, which no text does")
                    file.write(chunk)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: is damaged: {error}") from None
        file.flush()
        stack.pop_all()
    return file


def _is_array(file: IO[bytes], path: Path) -> bool:
    """Whether a file is one JSON array of objects. Raises DataError for one object over several lines."""
    head = file.read(4096).removeprefix(_BYTE_ORDER_MARK)
    file.seek(0)
    if re.match(rb"\s*\[\s*\{", head):
        first = file.readline(MAX_LINE_BYTES).strip()
        alone = first.endswith(b"]") and not file.read(1024).strip()
        file.seek(0)
        return alone or not first.endswith(b"]")
    if re.match(rb"\s*\{\s*\n", head) and _suffix(path) == ".json":
        raise DataError(
            f"{path}: is one JSON object over several lines: a row is an object on a line of its own, or an item of an "
            "array (jq -c '.NAME[]' FILE writes the items of one of its fields as lines)"
        )
    return False


def _items(file: IO[bytes], origin: str) -> Iterator[tuple[int, bytes]]:
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = len(_BYTE_ORDER_MARK) if data[:3] == _BYTE_ORDER_MARK else 0
    try:
        items = msgspec.json.decode(data[start:], type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    yield from ((number, bytes(item)) for number, item in enumerate(items, 1))


class Threads(Sequence[StringThread]):
    """Threads that are read from files on access. A slice reads no rows; a change of a thread's metadata is kept.

    `digest` identifies the rows' bytes and how they are read.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        starts: Sequence[int],
        offsets: array[int],
        read: Callable[[bytes], StringThread],
        digest: str,
    ) -> None:
        self._files, self._starts, self._offsets, self._read = files, starts, offsets, read
        self._chosen = range(len(offsets))
        self._digest = digest
        self._kept: dict[int, Line] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> StringThread: ...
    @overload
    def __getitem__(self, index: slice) -> Threads: ...
    def __getitem__(self, index: int | slice) -> StringThread | Threads:
        if isinstance(index, slice):
            part = Threads(self._files, self._starts, self._offsets, self._read, self._digest)
            part._chosen, part._kept = self._chosen[index], self._kept
            return part
        row = self._chosen[index]
        file = self._files[bisect_right(self._starts, row) - 1]
        thread = self._read(file.read(self._offsets[row]))
        thread.metadata = self._kept[row] if row in self._kept else _Metadata(thread.metadata, row, self._kept)
        return thread

    def digest(self) -> str:
        """A hash of the rows' bytes, of how they are read, and of the selection."""
        return hashlib.sha256(f"{self._digest} {self._chosen}".encode()).hexdigest()


class _Metadata(dict[str, Any]):
    """Metadata of a row. Once changed, it is kept and returned with the row on every later access."""

    __slots__ = ("_kept", "_row")

    def __init__(self, value: Line, row: int, kept: dict[int, Line]) -> None:
        super().__init__(value)
        self._row, self._kept = row, kept

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[Line]]:
        return dict, (dict(self),)


def _keeping(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def change(self: _Metadata, *args: Any, **kwargs: Any) -> Any:
        self._kept[self._row] = self
        return method(self, *args, **kwargs)

    return change


for _name in ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear"):
    setattr(_Metadata, _name, _keeping(_name))
