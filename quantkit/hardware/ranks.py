# SPDX-License-Identifier: Apache-2.0
"""The processes of one run (torchrun starts N of them), and what they do for each other.

    samples   rank r runs samples r, r + N, r + 2N, ... of each token set through the layers
    sums      what a site reads is sent to all ranks in the order of the samples; each sums up its strips of the Gram
              matrix, which are then sent to the others
    rows      each rank rounds its rows of a site's weights, and tries its share of the scales
    files     rank 0 writes; all read, so all must see the model's folder and the output's

Every number is computed by one rank, as a single process would, and moved as bytes. Left out on purpose: an all-reduce
of partial sums, whose last bits would depend on N. It would send two Gram matrices where this sends a site's inputs.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from quantkit.errors import RankError
from quantkit.hardware.launch import launch

MOST_DIMENSIONS = 4  # of a tensor that is sent
LOST = "a process of this run was lost, or all were stopped; finished layers are kept, and the same command continues"
PROBLEM, INTERRUPTED = 1, 130  # exit codes
PATIENCE = 30  # seconds that a process with nothing to tell waits to be stopped


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes. The default is a process by itself, for which nothing here does anything.

    rank: 0 to size - 1; local_rank, local_size: the same among those on this machine
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """This rank's samples of so many."""
        return slice(self.rank, count, self.size)

    def most(self, count: int) -> int:
        """The most samples that a rank has of so many."""
        return -(-count // self.size)

    def rows(self, count: int) -> slice:
        """This rank's rows of so many: neighbours, as `gather` puts them together."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def owner(self, strip: int) -> int:
        """The rank that sums up a strip of a Gram matrix; earlier strips are larger: 0, ..., N - 1, N - 1, ..., 0."""
        lap = strip % (2 * self.size)
        return min(lap, 2 * self.size - 1 - lap)

    def send_(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite a contiguous tensor with what the rank `source` has there."""
        if self.size > 1 and tensor.numel():
            with _lost():
                dist.broadcast(tensor.view(-1).view(torch.uint8), source)
        return tensor

    def gather(self, part: Tensor) -> Tensor:
        """What all ranks have, along dimension 0, in the order of the ranks."""
        if self.size == 1:
            return part
        shapes = self._shapes(part)
        return torch.cat([self._received(part, shape, rank) for rank, shape in enumerate(shapes) if shape is not None])

    def in_turn(self, own: Iterable[Tensor]) -> Iterator[Tensor]:
        """The first tensor of each rank, then the second of each, ...: with `own`, samples in their order.

        Every rank must have one at least.
        """
        if self.size == 1:
            yield from own
            return
        coming = iter(own)
        like = next(coming)
        mine: Tensor | None = like
        while any(shapes := self._shapes(mine)):
            for rank, shape in enumerate(shapes):
                if shape is not None:
                    yield self._received(like if mine is None else mine, shape, rank)
            mine = next(coming, None)

    def agree(self, value: Any) -> Any:
        """What rank 0 has: anything that JSON holds."""
        if self.size == 1:
            return value
        text = torch.tensor(list(json.dumps(value).encode()) if self.first else [], dtype=torch.uint8)
        return json.loads(bytes(self.gather(text).tolist()))

    def wait(self) -> None:
        """Until all ranks are here."""
        self.agree(None)

    def _shapes(self, tensor: Tensor | None) -> list[Sequence[int] | None]:
        """The shape of what each rank has, None where it has nothing."""
        own = [-1] * (MOST_DIMENSIONS + 1)
        if tensor is not None:
            own[: tensor.dim() + 1] = [tensor.dim(), *tensor.shape]
        found = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, torch.tensor(own))
        rows = [row.tolist() for row in found]
        return [None if row[0] < 0 else row[1 : row[0] + 1] for row in rows]

    def _received(self, mine: Tensor, shape: Sequence[int], source: int) -> Tensor:
        if source == self.rank:
            return self.send_(mine.contiguous(), source)
        return self.send_(torch.empty(shape, dtype=mine.dtype, device=mine.device), source)


ALONE = Ranks()


@contextmanager
def joined(tell: Callable[[str], None]) -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started; without it, this one is alone.

    What goes wrong is told by one process, the first to meet it: the exceptions of the others become silent exits.
    Where a process is lost, torchrun stops the others; then `tell` is called with one line, by one of them.
    """
    started = launch()
    if started.size == 1:
        yield ALONE
        return
    try:
        store, rank, size = next(iter(rendezvous("env://")))
    except (RuntimeError, OSError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"the other processes cannot be met at {place} (MASTER_ADDR, MASTER_PORT); start them with torchrun, "
            "or unset RANK to run alone"
        ) from error
    local = started.local_rank
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("ranks", store), rank=rank, world_size=size)

    def first_to_tell() -> bool:
        with suppress(RuntimeError):  # the store is gone with whoever kept it: better told twice than never
            return bool(store.add("told", 1) == 1)
        return True

    _heed_termination(first_to_tell, tell)
    try:
        yield Ranks(rank, size, local, started.local_size)
    except (Exception, KeyboardInterrupt) as problem:
        if first_to_tell():
            raise
        if isinstance(problem, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from None
        give_way(PROBLEM)
    else:
        dist.destroy_process_group()


def give_way(code: int) -> NoReturn:
    """End without a word, but stay until torchrun stops this process, as it does when another ends with a problem.

    An exit before that would have torchrun stop the other one, perhaps before it has told what is wrong.
    """
    with suppress(KeyboardInterrupt):  # torchrun hands on an interrupt, and another has told of that as well
        time.sleep(PATIENCE)
    raise SystemExit(code)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(LOST) from error


def _heed_termination(first_to_tell: Callable[[], bool], tell: Callable[[str], None]) -> None:
    """On SIGTERM say so and end: in a thread, as the main one may be waiting for what will not come."""
    heard, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def listen() -> None:
        while signal.SIGTERM not in os.read(heard, 1):
            pass
        if first_to_tell():
            tell(LOST)
        os._exit(PROBLEM)

    threading.Thread(target=listen, daemon=True).start()
