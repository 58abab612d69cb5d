# SPDX-License-Identifier: Apache-2.0
"""A file -> pieces of its text, or its rows one after the other.

Nothing here holds more than one record of a file and a little beside it. A record is at most `LONGEST` long, so that a
small file that unpacks to something huge is refused and not read.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.calibration.shapes import EXPECTED, FIELDS
from quantkit.errors import InputError
from quantkit.text import clean_line

LONGEST = 1 << 25  # bytes, or characters, of one record
PIECE = 1 << 18  # characters of a text that are read together
SWELLING = 50  # times that a column of a parquet file may grow when it is unpacked
JSON_PIECE = 1 << 14  # the same of JSON, whose rest is copied with each record
BATCH = 32  # rows of a parquet file that are read together

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
DECODER = json.JSONDecoder()
TEXTS = (".txt", ".raw", ".tokens", ".md")

Row = tuple[object, str]  # a record, and its place for messages


def kind_of(path: Path) -> str:
    """The last part of a file's name that says what is in it: not how it is packed."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower()


def pieces_of(path: Path) -> Iterator[str]:
    """The text of a file, cut anywhere. Line ends stay as they are."""
    with _reading(path, "UTF-8 text") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        while piece := text.read(PIECE):
            yield piece


def rows_of(path: Path, field: str | None) -> Iterator[Row]:
    """The rows of a file. Raises InputError for a file that cannot be read, or is of no known kind."""
    return READERS[kind_of(path)](path, field)


def _json_lines(path: Path, field: str | None) -> Iterator[Row]:
    with _reading(path, "JSON lines") as file:
        for line, where in _lines(file, path):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: expected one JSON record, got {clean_line(error)}; mend it") from None
                yield record, where


def _json(path: Path, field: str | None) -> Iterator[Row]:
    """A list of records, or records one after the other."""
    with _reading(path, "JSON") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        for number, record in enumerate(_values(text, path), 1):
            yield record, f"{path}: record {number}"


def _values(text: io.TextIOWrapper, path: Path) -> Iterator[Any]:
    """The values of a JSON list, or of JSON values one after the other, read piece by piece."""
    rest = _skip("", text)
    listed = rest.startswith("[")
    rest = _skip(rest[listed:], text)
    while rest and not (listed and rest.startswith("]")):
        value, rest = _value(rest, text, path)
        yield value
        rest = _skip(rest, text)
        if listed and rest.startswith(","):
            rest = _skip(rest[1:], text)
        elif listed and not rest.startswith("]"):
            break
    if listed and not rest.startswith("]"):
        raise InputError(f"{path}: expected ',' or the end of the list, got {rest[:9]!r}; the file may be cut short")


def _skip(rest: str, text: io.TextIOWrapper) -> str:
    """The rest without the white space in front; empty only at the end of the file."""
    rest = rest.lstrip()
    while not rest and (more := text.read(JSON_PIECE)):
        rest = more.lstrip()
    return rest


def _value(rest: str, text: io.TextIOWrapper, path: Path) -> tuple[Any, str]:
    """The first JSON value, and what is behind it."""
    while True:
        try:
            value, end = DECODER.raw_decode(rest)
            return value, rest[end:]
        except (ValueError, RecursionError) as error:
            if len(rest) > LONGEST:
                raise _too_long(f"{path}: a record") from None
            more = text.read(max(JSON_PIECE, len(rest)))
            if not more:
                raise InputError(f"{path}: expected JSON, got {clean_line(error)}; mend it") from None
            rest += more


def _table(path: Path, field: str | None, delimiter: str) -> Iterator[Row]:
    with _reading(path, "a table") as file:
        csv.field_size_limit(LONGEST)
        lines = (line.decode("utf-8-sig") for line, _ in _lines(file, path))
        rows = csv.reader(lines, delimiter=delimiter)
        names = next(rows, [])
        _require_columns(path, names, field)
        for number, row in enumerate(rows, 2):
            if len(row) > len(names):
                raise InputError(
                    f"{path}: row {number}: expected {len(names)} fields, got {len(row)}; put quotes around text that "
                    f"holds {delimiter!r}"
                )
            if row:
                yield dict(zip(names, row, strict=False)), f"{path}: row {number}"


def _parquet(path: Path, field: str | None) -> Iterator[Row]:
    import pyarrow.parquet as parquet  # only here: it is slow to import

    try:
        described = parquet.read_metadata(path)
        columns = _require_columns(path, described.schema.to_arrow_schema().names, field)
        _refuse_swelling(path, described, columns)
        leaves = [described.schema.column(i) for i in range(len(described.schema))]
        strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # a text that many rows share is held once
        with parquet.ParquetFile(path, read_dictionary=strings) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
                small = sum(map(_decoded, batch.columns)) <= LONGEST
                for rows in [batch] if small else [batch.slice(i, 1) for i in range(batch.num_rows)]:
                    if not small and sum(map(_decoded, rows.columns)) > LONGEST:
                        raise _too_long(f"{path}: row {number + 1}")
                    for record in rows.to_pylist():
                        number += 1
                        yield record, f"{path}: row {number}"
    except InputError:
        raise
    except Exception as error:  # of many types that have nothing in common
        raise unreadable(path, "a parquet file", error) from None


def _refuse_swelling(path: Path, described: Any, columns: list[str]) -> None:
    """Raise InputError for a parquet file of which a little unpacks to more than memory may hold.

    Its pages are unpacked as a whole, so the sizes that it states are looked at before. Texts become about 4 times as
    long.
    """
    for index in range(described.num_row_groups):
        group = described.row_group(index)
        for column in map(group.column, range(group.num_columns)):
            packed, whole = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema.partition(".")[0] in columns and whole > max(LONGEST, SWELLING * packed):
                raise InputError(
                    f"{path}: {packed} bytes of {column.path_in_schema} unpack to {whole}; expected up to {SWELLING} "
                    "times as much, as of texts; use another file"
                )


def _decoded(column: Any) -> int:
    """Bytes of an arrow array when each text that it names stands by itself."""
    import pyarrow as arrow
    import pyarrow.compute as compute

    kind = column.type
    if arrow.types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary)
        return int(compute.sum(lengths.take(column.indices)).as_py() or 0)
    if arrow.types.is_struct(kind):
        return sum(map(_decoded, column.flatten()))
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        return _decoded(column.flatten())
    return int(column.nbytes)


READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}


def _require_columns(path: Path, names: list[str], field: str | None) -> list[str]:
    """The columns that can matter. Raises InputError if there are none."""
    columns = [name for name in names if name == field or (field is None and name in FIELDS)]
    if not columns:
        expected = f"columns named {EXPECTED}" if field is None else f"a column {field!r}"
        got = clean_line(", ".join(map(str, names))) or "none"
        raise InputError(f"{path}: expected {expected}, got {got}; name the one to take with --field NAME")
    return columns


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, str]]:
    """The lines of a file, each with its place."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > LONGEST:
            raise _too_long(where)
        yield line, where


def _too_long(where: str) -> InputError:
    return InputError(f"{where}: longer than {LONGEST >> 20} MiB; cut it into smaller documents")


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[BinaryIO]:
    """A file opened as its name says it is packed; what fails within is told in one line."""
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, got {clean_line(error)}; save it as UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        raise unreadable(path, expected, error) from None


def existing_file(source: str, expected: str) -> Path:
    """The path of a source that is a file.

    Raises:
        InputError: there is none, or it cannot be read; `expected` says what a source may be.
    """
    fault = "no such file"
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            fault = "a folder, not a file"
        elif path.exists():
            fault = "neither a file nor a folder"
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, no such user
        fault = clean_line(error)
    raise InputError(f"{source or repr(source)}: {fault}; expected {expected}")


def unreadable(path: Path, expected: str, error: Exception) -> InputError:
    """The error for a file that cannot be read as what its name says."""
    reason = clean_line(error) or type(error).__name__
    return InputError(f"{path}: expected {expected}, got {reason}; check or replace the file")
