# SPDX-License-Identifier: Apache-2.0
"""Every source of text -> documents: bundled sets, files, and datasets of the hub."""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from quantkit.errors import InputError
from quantkit.network import patient_library
from quantkit.resources import calibration_dir
from quantkit.text import clean_line

MIX = ("general", "code", "chinese", "reasoning")
DEFAULT_EVAL = "eval"
BUNDLED = ("mix", *MIX, DEFAULT_EVAL)

Conversation = list[dict[str, Any]]
Document = str | Conversation

_EXPECTED = (
    f"a bundled set ({', '.join(BUNDLED)}), a file (.txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, .safetensors), "
    "or hf:ORG/NAME[/CONFIG][:SPLIT]"
)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_CHARACTERS_PER_TOKEN = 12  # more than any language and tokenizer need: bounds what is streamed from the hub


def documents_of(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    """All documents of a source that hold something; of the hub's, no more than `enough` tokens can need."""
    found = False
    for document in _read(source, offline=offline, shuffle=shuffle, enough=enough, size=size):
        if not isinstance(document, str) or document.strip():
            found = True
            yield document
    if not found:
        raise InputError(f"{source}: expected text, got none; use another source: {_EXPECTED}")


def _read(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    if source in BUNDLED:
        yield from _jsonl(calibration_dir() / f"{source}.jsonl.xz")
        return
    if source.startswith("hf:"):
        yield from _hub(source, offline=offline, shuffle=shuffle, enough=enough, size=size)
        return
    path = existing_file(source)
    name = path.name.lower()
    if name.endswith(".txt"):
        yield _text(path)
    elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        yield from _jsonl(path)
    elif name.endswith(".parquet"):
        yield from _parquet(path)
    else:
        raise InputError(f"{source}: unknown kind of source; expected {_EXPECTED}")


def existing_file(source: str) -> Path:
    """The path of a source that is a file. Raises InputError if there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    found = "a folder" if path.is_dir() else "no such file"
    raise InputError(f"{source or repr(source)}: {found}; expected {_EXPECTED}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # not read_text: line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "UTF-8 text", error) from None


def _jsonl(path: Path) -> Iterator[Document]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: expected one JSON record, got {first_line(error)}; mend it") from None
                yield _document(record, where)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, "JSON lines", error) from None


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow as arrow  # only here: it is slow to import
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("messages", "text") if name in file.schema_arrow.names]
            if not columns:
                got = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: expected a column 'text' or 'messages', got {got}; rename one")
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield _document(row, f"{path}: row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise unreadable(path, "a parquet file", error) from None


def _document(record: object, where: str) -> Document:
    """Text or messages of a record; messages where it has both, as text may be another model's template."""
    fields = record if isinstance(record, dict) else {}
    messages, text = fields.get("messages"), fields.get("text")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    if isinstance(text, str) and messages is None:
        return text
    got = f"the fields {', '.join(map(str, fields))}" if fields else type(record).__name__
    raise InputError(
        f"{where}: expected 'text' (a string) or 'messages' (a list of role and content, both strings), got {got}; "
        "mend or remove it"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """`hf:ORG/NAME[/CONFIG][:SPLIT]` -> (dataset id, config or None, split). Raises InputError."""
    part = r"[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(rf"hf:({part}/{part})(?:/({part}))?(?::({part}))?", source)
    if match is None:
        raise InputError(f"{source}: expected hf:ORG/NAME[/CONFIG][:SPLIT]; for example hf:openai/gsm8k/main:train")
    return match[1], match[2], match[3] or "train"


def _hub(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    """Stream a dataset, in an order shuffled within a buffer, until `enough` tokens are surely there."""
    dataset, config, split = parse_hub(source)
    if offline or constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{source}: a dataset of the hub needs the network, and this run is offline; use a bundled set "
            f"({', '.join(BUNDLED)}) or a file"
        )
    import datasets  # only here: it is slow to import

    fault = ""
    try:
        with patient_library():
            stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
            if shuffle is not None:
                stream = stream.shuffle(seed=shuffle, buffer_size=1000)
            characters = 0
            for number, record in enumerate(stream, 1):
                document = _document(record, f"{source}: row {number}")
                yield document
                length = len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
                characters += min(length, size)
                if characters >= enough * _CHARACTERS_PER_TOKEN:
                    return
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types for a wrong name or a lost connection
        fault = f"{type(error).__name__}: {clean_line(error)}"
    if fault:  # raised here, so that it carries no error of the library, which may quote a token
        raise InputError(
            f"{source}: expected a dataset with split {split!r}, got {fault}; "
            "check the name, the config and the connection"
        )


def unreadable(path: Path, expected: str, error: Exception) -> InputError:
    """The error for a file that cannot be read as what its name says."""
    return InputError(f"{path}: expected {expected}, got {first_line(error)}; check or replace the file")


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
