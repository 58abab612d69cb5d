# SPDX-License-Identifier: Apache-2.0
"""Where the hidden states of a token stream live while layers come and go.

A stream is one tensor [samples, seqlen, hidden], updated in place one micro-batch at a time. It lives on the device if
it fits there, else in RAM, else in a memory-mapped file in the output folder (see `memory`). The place does not change
any value.

A CPU takes one sample at a time: what a product comes to in the last bit may depend on how many rows it has, and the
result must not depend on memory. A GPU takes as many as fit.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.hardware.batching import LOGITS_AT_ONCE, TOKENS_AT_ONCE_GPU
from quantkit.hardware.machine import pin

SPARE = 0.5  # the share of free memory that streams may take: the layer and its Gram matrices need the rest


@dataclass
class Peak:
    """The largest magnitude that a stream has met, and the name of the layer where."""

    value: float = 0.0
    where: str = ""

    def see(self, value: float, where: str) -> None:
        """Take it over if it is larger."""
        if value > self.value:
            self.value, self.where = value, where


@dataclass(frozen=True)
class Stream:
    """The hidden states of a token set.

    states: [samples, seqlen, hidden] in `place` ("device", "ram" or "file")
    batch: samples per micro-batch
    mapping: of the file
    exact: whether its matmuls are to be exact: see `matmul.fast_linears`
    peak: of its hidden states and of what linears read, in the layers that it went through
    """

    states: Tensor
    place: str
    batch: int
    mapping: mmap.mmap | None = None
    exact: bool = True
    peak: Peak = field(default_factory=Peak)

    def batches(self, samples: int | None = None, first: int = 0) -> Iterator[slice]:
        """The micro-batches, as slices of samples: of all, or of the first so many; from one of them on."""
        count = len(self.states) if samples is None else samples
        for start in range(first, count, self.batch):
            yield slice(start, min(start + self.batch, count))
            if self.mapping is not None:  # pages of a file that were touched count as this process's own
                self.mapping.madvise(mmap.MADV_DONTNEED)


def micro_batch(seqlen: int, device: torch.device) -> int:
    """Samples per micro-batch, where memory sets no limit."""
    return 1 if device.type == "cpu" else max(1, TOKENS_AT_ONCE_GPU // seqlen)


def few_positions(states: Tensor, vocabulary: int) -> Iterator[slice]:
    """The positions of hidden states [batch, seqlen, hidden] in slices with LOGITS_AT_ONCE logits at most."""
    batch, seqlen = states.shape[:2]
    at_once = max(1, LOGITS_AT_ONCE // (batch * vocabulary))
    return (slice(start, min(start + at_once, seqlen)) for start in range(0, seqlen, at_once))


def regrouped(tensors: Iterable[Tensor], samples: int) -> Iterator[Tensor]:
    """The same samples in the same order, so many in each tensor but the last; tensors are cut along dimension 0."""
    parts: list[Tensor] = []
    for tensor in tensors:
        parts.append(tensor)
        while sum(map(len, parts)) >= samples:
            together = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield together[:samples]
            parts = [together[samples:]] if len(together) > samples else []
            del together
    if parts:
        yield torch.cat(parts)


def open_stream(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    spill: Path,
    place: str | None = None,
    batch: int | None = None,
) -> Stream:
    """Room for hidden states [samples, seqlen, hidden]; `spill` is the file to map when no memory holds them.

    The file is unlinked at once: it takes disk while the process lives, and is never left behind.
    """
    samples, seqlen, hidden = shape
    nbytes = samples * seqlen * hidden * dtype.itemsize
    place = place or choose_place(nbytes, device)
    batch = batch or micro_batch(seqlen, device)
    if place == "device":
        return Stream(torch.empty(shape, dtype=dtype, device=device), place, batch)
    if place == "ram":
        states = torch.empty(shape, dtype=dtype)
        if device.type == "cuda":
            pin(states)
        return Stream(states, place, batch)
    try:
        with spill.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a mapped file that the disk cannot hold kills the process
            mapping = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise OutputError(
            f"{spill.parent}: hidden states of {nbytes / 2**30:.2f} GiB fit neither in memory nor on this disk "
            f"({error.strerror}); use fewer --samples, or an --out on another disk"
        ) from error
    finally:
        spill.unlink(missing_ok=True)
    return Stream(torch.frombuffer(mapping, dtype=dtype).view(shape), place, batch, mapping)


def choose_place(nbytes: int, device: torch.device) -> str:
    """Where a stream of this size goes: "device", "ram" or "file"."""
    if device.type == "cuda" and nbytes < SPARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "ram" if nbytes < SPARE * psutil.virtual_memory().available else "file"
