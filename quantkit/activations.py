# SPDX-License-Identifier: Apache-2.0
"""Where the hidden states of a token stream live while layers come and go.

A stream is one tensor [samples, seqlen, hidden], updated in place one micro-batch at a time. It lives on the device if
it fits there, else in RAM, else in a memory-mapped file in the output folder. The place does not change any value.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from quantkit.errors import OutputError

TOKENS_AT_ONCE = 4096  # a micro-batch
TOKENS_AT_ONCE_GPU = 8192
TOKENS_PER_SUM = 4096  # that a Gram matrix takes at once: fixed, so that memory does not decide how sums are split
SPARE = 0.5  # the share of free memory that streams may take: the layer and its Gram matrices need the rest


@dataclass(frozen=True)
class Stream:
    """states: [samples, seqlen, hidden] in `place` ("device", "ram" or "file"); batch: samples per micro-batch."""

    states: Tensor
    place: str
    batch: int

    def batches(self) -> Iterator[slice]:
        """The micro-batches, as slices of samples."""
        for start in range(0, len(self.states), self.batch):
            yield slice(start, min(start + self.batch, len(self.states)))


def micro_batch(seqlen: int, device: torch.device) -> int:
    """Samples per micro-batch."""
    return max(1, (TOKENS_AT_ONCE if device.type == "cpu" else TOKENS_AT_ONCE_GPU) // seqlen)


def samples_per_sum(seqlen: int) -> int:
    """Samples that are added to a Gram matrix at once, whatever the micro-batch."""
    return max(1, TOKENS_PER_SUM // seqlen)


def regrouped(tensors: Iterable[Tensor], samples: int) -> Iterator[Tensor]:
    """The same samples in the same order, so many in each tensor but the last; tensors are cut along dimension 0."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        waiting.append(tensor)
        while sum(map(len, waiting)) >= samples:
            together = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            yield together[:samples]
            waiting = [together[samples:]] if len(together) > samples else []
            del together
    if waiting:
        yield torch.cat(waiting)


def open_stream(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, spill: Path, place: str | None = None
) -> Stream:
    """Room for hidden states [samples, seqlen, hidden]; `spill` is the file to map when no memory holds them.

    The file is unlinked at once: it takes disk while the process lives, and is never left behind.
    """
    samples, seqlen, hidden = shape
    nbytes = samples * seqlen * hidden * dtype.itemsize
    place = place or choose_place(nbytes, device)
    batch = micro_batch(seqlen, device)
    if place == "device":
        return Stream(torch.empty(shape, dtype=dtype, device=device), place, batch)
    if place == "ram":
        return Stream(torch.empty(shape, dtype=dtype), place, batch)
    try:
        with spill.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a mapped file that the disk cannot hold kills the process
        flat = torch.from_file(str(spill), shared=True, size=samples * seqlen * hidden, dtype=dtype)
    except OSError as error:
        raise OutputError(
            f"{spill.parent}: hidden states of {nbytes / 2**30:.2f} GiB fit neither in memory nor on this disk "
            f"({error.strerror}); use fewer --samples, or an --out on another disk"
        ) from error
    finally:
        spill.unlink(missing_ok=True)
    return Stream(flat.view(shape), place, batch)


def choose_place(nbytes: int, device: torch.device) -> str:
    """Where a stream of this size goes: "device", "ram" or "file"."""
    if device.type == "cuda" and nbytes < SPARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "ram" if nbytes < SPARE * psutil.virtual_memory().available else "file"
