"""Rows of tables: CSV by the standard library, Parquet and Arrow by pyarrow."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
from collections.abc import Iterable, Iterator
from typing import IO, Any

from harmony_core.errors import DataError, ResourceError

_BATCH_ROWS = 256
_MAX_GROUP_BYTES = 8 * 1024**3
"""Of a row group, as its file declares them: it is unpacked whole."""

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


def parquet_rows(file: IO[bytes], origin: str) -> Rows:
    """Raises DataError, and ResourceError without pyarrow."""
    parquet = _library("pyarrow.parquet")
    with _typed(origin, "Parquet"):
        table = parquet.ParquetFile(file)
        groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
        if any(group.total_byte_size > _MAX_GROUP_BYTES for group in groups):
            raise DataError(f"{origin}: has a row group of more than {_MAX_GROUP_BYTES} bytes: write smaller ones")
        yield from numbered(table.iter_batches(batch_size=_BATCH_ROWS))


def arrow_rows(file: IO[bytes], origin: str) -> Rows:
    """Of an Arrow file, which is mapped into memory, or stream. Raises DataError, ResourceError without pyarrow."""
    arrow = _library("pyarrow")
    with _typed(origin, "Arrow"):
        source = arrow.memory_map(origin) if file.name == origin else file
        if file.read(6) == b"ARROW1":
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = iter(arrow.ipc.open_stream(source))
        yield from numbered(batches)


def numbered(batches: Iterable[Any]) -> Rows:
    """The rows of Arrow's batches, without the nulls inside objects: in a table each has the fields of all."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file point anywhere
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield number, {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ResourceError("Parquet and Arrow files need pyarrow", hint="pip install 'harmony-core[data]'") from None


@contextlib.contextmanager
def _typed(origin: str, what: str) -> Iterator[None]:
    arrow = _library("pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{origin}: not {what}, or damaged: {str(error).splitlines()[0][:200]}") from None
