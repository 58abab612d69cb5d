# SPDX-License-Identifier: Apache-2.0
"""GGUF files, version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header that says it all, then
the tensors, each at a multiple of 32 bytes.

Everything in the header is known before any weight is, so a file is written in one pass with one tensor in memory.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.writer import write_chunks
from quantkit.errors import ModelError
from quantkit.formats.blocks import dequantize_blocks
from quantkit.formats.gguf import ALL_TYPES, UNREAD_TYPES, BlockType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
STRING, ARRAY, BOOL, UINT32, INT32, FLOAT32 = 8, 9, 7, 4, 5, 6
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_ITEMS, MAX_TEXT = 2**24, 2**26


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file before it is there; shape as torch has it (rows first)."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * ALL_TYPES[self.type].row_bytes(self.shape[-1])


def write_gguf(
    path: Path, metadata: Mapping[str, Value], infos: Sequence[TensorInfo], data: Iterable[tuple[str, Iterable[Tensor]]]
) -> str:
    """Write a file atomically and return its sha256.

    data: (name, its bytes in any number of pieces) of every tensor, in the order of `infos`; asked for one by one.

    Raises:
        OutputError: the disk is full, or the folder is missing or cannot be written.
    """
    return write_chunks(path, _chunks(metadata, infos, data))


def header_bytes(metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor, filled up to a multiple of 32 bytes."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    for key, value in metadata.items():
        kind, encoded = _encode(value)
        parts += [_text(key), struct.pack("<I", kind), encoded]
    offset = 0
    for info in infos:
        sizes = struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        parts += [_text(info.name), struct.pack("<I", len(info.shape)), sizes]
        parts.append(struct.pack("<IQ", ALL_TYPES[info.type].code, offset))
        offset += _padded(info.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def file_bytes(metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> int:
    """The size of the file that `write_gguf` makes."""
    return len(header_bytes(metadata, infos)) + sum(_padded(info.nbytes) for info in infos)


def _chunks(
    metadata: Mapping[str, Value], infos: Sequence[TensorInfo], data: Iterable[tuple[str, Iterable[Tensor]]]
) -> Iterator[bytes | memoryview]:
    yield header_bytes(metadata, infos)
    for info, (name, pieces) in zip(infos, data, strict=True):
        written = 0
        for piece in pieces:
            raw = piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            written += len(raw)
            yield raw
        if (info.name, info.nbytes) != (name, written):
            raise ValueError(f"planned {info.name} of {info.nbytes} bytes, made {name} of {written}")
        yield bytes(_padded(info.nbytes) - info.nbytes)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _encode(value: Value) -> tuple[int, bytes]:
    if isinstance(value, str):
        return STRING, _text(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    first = value[0] if value else ""
    if isinstance(first, str):
        kind, items = STRING, b"".join(_text(str(item)) for item in value)
    else:
        kind, letter = (FLOAT32, "f") if isinstance(first, float) else (INT32, "i")
        items = struct.pack(f"<{len(value)}{letter}", *value)
    return ARRAY, struct.pack("<IQ", kind, len(value)) + items


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file: its metadata, and where its tensors lie (bytes from the beginning of the file)."""

    path: Path
    metadata: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]

    def read_blocks(self, name: str) -> Tensor:
        """The tensor as stored, uint8 [rows, row bytes].

        Raises:
            ModelError: there is none of that name, or the file failed or ended.
        """
        if name not in self.infos:
            raise ModelError(f"{self.path}: expected a tensor named {name}, found none")
        info = self.infos[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offsets[name])
                read = file.readinto(raw.numpy().data)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        if read != info.nbytes:
            raise ModelError(f"{self.path}: {name} ended after {read} of {info.nbytes} bytes; the file is cut off")
        return raw.view(-1, ALL_TYPES[info.type].row_bytes(info.shape[-1]))

    def read(self, name: str) -> Tensor:
        """The float32 values that llama.cpp computes with, in the tensor's shape.

        Raises:
            ModelError: see `read_blocks`.
        """
        return dequantize_blocks(self.read_blocks(name), self.infos[name].type).view(self.infos[name].shape)


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a file.

    Raises:
        ModelError: not a GGUF file of version 2 or 3, damaged, or with tensors of a type that is not known here.
    """
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: expected a regular file")
    try:
        with path.open("rb") as file:
            return _read_header(path, file, path.stat().st_size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise ModelError(f"{path}: its GGUF header is damaged or cut off ({type(error).__name__})") from error


def _read_header(path: Path, file: BufferedReader, size: int) -> GGUFFile:
    def number(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def count(most: int, what: str) -> int:
        found: int = number("<Q")
        if found > most:
            raise ModelError(f"{path}: {found} {what}, at most {most} expected; the file is damaged")
        return found

    def text() -> str:
        return file.read(count(MAX_TEXT, "bytes in a text")).decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner: int = number("<I")
            read: Callable[[], Any] = text if inner == STRING else lambda: number(SCALARS[inner])
            return [read() for _ in range(count(MAX_ITEMS, "items"))]
        return number(SCALARS[kind])

    if file.read(4) != MAGIC or (version := number("<I")) not in (2, 3):
        raise ModelError(f"{path}: not a GGUF file of version 2 or 3")
    del version
    tensors, keys = count(MAX_ITEMS, "tensors"), count(MAX_ITEMS, "keys")
    metadata = {text(): value(number("<I")) for _ in range(keys)}
    codes: dict[int, BlockType] = {kind.code: kind for kind in ALL_TYPES.values()}
    infos, offsets = {}, {}
    for _ in range(tensors):
        name = text()
        dimensions: int = number("<I")
        if not 1 <= dimensions <= 4:
            raise ModelError(f"{path}: {ascii(name)[:80]}: {dimensions} dimensions; the file is damaged")
        shape = tuple(reversed([number("<Q") for _ in range(dimensions)]))
        code = number("<I")
        if code not in codes:
            kind = UNREAD_TYPES.get(code, f"number {code}")
            raise ModelError(
                f"{path}: {ascii(name)[:80]}: blocks of type {kind} are not read; expected {', '.join(ALL_TYPES)}"
            )
        if shape[-1] % codes[code].columns:
            raise ModelError(
                f"{path}: {ascii(name)[:80]}: rows of {shape[-1]}, not of whole blocks of {codes[code].name}"
            )
        infos[name] = TensorInfo(name, codes[code].name, shape)
        offsets[name] = number("<Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ModelError(f"{path}: general.alignment: expected a positive number, got {alignment!r:.40}")
    begin = -(-file.tell() // alignment) * alignment
    for name, info in infos.items():
        offsets[name] += begin
        if offsets[name] + info.nbytes > size:
            raise ModelError(f"{path}: {ascii(name)[:80]} lies beyond the file's {size} bytes; it is cut off")
    return GGUFFile(path, metadata, infos, offsets)
