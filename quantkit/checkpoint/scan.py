# SPDX-License-Identifier: Apache-2.0
"""A look at every stored number of a model before work begins: NaN and infinities are found in one pass over the disk.

A float is not finite if all bits of its exponent are set. So with the sign shifted out, as a whole number, it is at
least as large as infinity, and the largest of many tells of all: one pass in the processor's cache.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.reader import Checkpoint, Entry, require_finite
from quantkit.errors import ModelError

# dtype -> the whole numbers that it is looked at as, and infinity among them without the sign; E4M3 has NaN alone.
INFINITY: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float64": (np.uint64, 0x7FF << 53),
    "float32": (np.uint32, 0xFF << 24),
    "bfloat16": (np.uint16, 0xFF << 8),
    "float16": (np.uint16, 0x1F << 11),
    "float8_e5m2": (np.uint8, 0x1F << 3),
    "float8_e4m3fn": (np.uint8, 0x7F << 1),
}
PIECE_BYTES = 2**21
MOST_THREADS = 8


def require_finite_weights(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse a model whose named tensors hold NaN or infinities, before anything is computed.

    Raises:
        NumericsError: naming the tensor, and how many of its values are not finite. ModelError: a file that fails.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        in_order = sorted(names, key=lambda name: (checkpoint.entries[name].file, checkpoint.entries[name].offset))
        for name, beyond in zip(in_order, pool.map(lambda name: _has_others(checkpoint, name), in_order), strict=True):
            if beyond:
                require_finite(name, checkpoint.read(name), checkpoint.entries[name].file)


def _has_others(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor, or what it is scaled by, holds a value that is not finite."""
    entry = checkpoint.entries[name]
    stored = [entry] if entry.scaled is None else [entry.scaled.weight, entry.scaled.scales]
    return any(_is_beyond(checkpoint, each) for each in stored)


def _is_beyond(checkpoint: Checkpoint, entry: Entry) -> bool:
    if entry.dtype not in INFINITY:
        return False
    kind, infinity = INFINITY[entry.dtype]
    return any(int((part.view(kind) << 1).max()) >= infinity for part in _parts(checkpoint, entry))


def _parts(checkpoint: Checkpoint, entry: Entry) -> Iterator[NDArray[np.uint8]]:
    path = checkpoint.directory / entry.file
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            left = entry.nbytes
            while left:
                part = np.fromfile(file, np.uint8, min(PIECE_BYTES, left))
                if not len(part):
                    raise ModelError(f"{path}: ended {left} bytes before its last tensor did; the file has changed")
                left -= len(part)
                yield part
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
