# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, as pure functions between bytes and shapes.

A file is: the length of the header (uint64, little endian), the header (JSON, padded with spaces to a multiple of
8 bytes), and the tensors' bytes, without a gap, in the order of their offsets.
Source: https://huggingface.co/docs/safetensors (format section).

Headers are written here and not by the safetensors library because a plan must know a file's exact size from shapes
alone, and because bytes must not depend on the version of a library. The order of tensors is the library's own
(wide dtypes first, which keeps every tensor aligned; then by name), so the bytes are the same as its bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from quantkit.dtypes import ITEMSIZE
from quantkit.errors import ModelError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPES = {  # the names in a file and torch's, in the library's order: tensors are stored from the last to the first
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
RANK_OF = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

Spec = tuple[str, tuple[int, ...]]  # torch's name of the dtype, and the shape


@dataclass(frozen=True)
class Span:
    """A tensor as a header describes it: its bytes are start .. start + nbytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def spec_bytes(spec: Spec) -> int:
    """The bytes of a tensor of this dtype and shape."""
    dtype, shape = spec
    return math.prod(shape) * ITEMSIZE[dtype]


def encode(specs: Mapping[str, Spec]) -> tuple[bytes, list[str]]:
    """The first bytes of the file (length and header), and the order in which the tensors' bytes follow.

    Raises:
        ValueError: a dtype that safetensors does not hold.
    """
    for name, (dtype, _) in specs.items():
        if dtype not in RANK_OF:
            raise ValueError(f"{name}: safetensors does not hold {dtype}")
    order = sorted(specs, key=lambda name: (-RANK_OF[specs[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        dtype, shape = specs[name]
        end = start + spec_bytes(specs[name])
        header[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order


def decode(text: bytes, data_bytes: int, where: str) -> dict[str, Span]:
    """The tensors that a header describes, which must fill exactly the data_bytes that follow it.

    Raises:
        ModelError: anything that is not a header of this file, in one line that begins with `where`.
    """
    fields = parse_object(text, where)
    fields.pop("__metadata__", None)
    spans = {name: _span(name, field, where) for name, field in fields.items()}
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if span.start != end:
            fault = "overlaps the tensor before it" if span.start < end else "leaves a hole before it"
            raise ModelError(
                f"{where}: {name} {fault} (starts at byte {span.start}, expected {end}); the file is damaged"
            )
        end += span.nbytes
    if end > data_bytes:
        raise ModelError(f"{where}: truncated: expected {end} bytes of tensors, got {data_bytes}; download it again")
    if end < data_bytes:
        raise ModelError(f"{where}: {data_bytes - end} bytes follow the last tensor; the file is damaged")
    return spans


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys are unique and printable.

    Raises:
        ModelError: it is anything else.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: expected a JSON object ({type(error).__name__}); the file is damaged") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected a JSON object, got {type(value).__name__}; the file is damaged")
    for name in value:
        if not name.isprintable():
            raise ModelError(f"{where}: {ascii(name)[:80]} is not a printable name; the file is damaged")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _span(name: str, field: Any, where: str) -> Span:
    if not isinstance(field, dict):
        raise ModelError(f"{where}: {name} is not described by an object; the file is damaged")
    dtype_name, shape, offsets = (field.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        raise ModelError(f"{where}: {name} has dtype {ascii(dtype_name)[:40]}, which is not read (read are {known})")
    # Sizes beyond int64 could come with a zero beside them, and no tensor can have them.
    if not _naturals(shape) or math.prod(max(size, 1) for size in shape) * ITEMSIZE[dtype] >= 2**63:
        raise ModelError(f"{where}: {name} has shape {ascii(shape)[:40]}; the file is damaged")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: {name} has data_offsets {ascii(offsets)[:40]}; the file is damaged")
    expected, got = spec_bytes((dtype, tuple(shape))), offsets[1] - offsets[0]
    if expected != got:
        raise ModelError(f"{where}: {name} {dtype_name} {shape} takes {expected} bytes, but its offsets hold {got}")
    return Span(dtype, tuple(shape), offsets[0], got)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
