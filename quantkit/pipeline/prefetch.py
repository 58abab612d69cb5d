# SPDX-License-Identifier: Apache-2.0
"""What is done beside the main thread: the next thing is read, the last one written, while this one is computed.

One thread each, one call at a time, in order: what is read and written, and when, does not depend on timing. What a
call raises is raised in the main thread, where its result is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Results of read(0), read(1), ... in order; the next one is on its way while one is in use."""

    def __init__(self, read: Callable[[int], T], count: int, thread: ThreadPoolExecutor) -> None:
        self._read, self._count, self._thread, self._next = read, count, thread, 0
        self._next_result: Future[T] | None = None

    def take(self) -> T:
        """The next result; raises what reading it raised."""
        future = self._next_result or self._submit()
        result = future.result()
        self._next_result = self._submit() if self._next < self._count else None
        return result

    def _submit(self) -> Future[T]:
        self._next += 1
        return self._thread.submit(self._read, self._next - 1)


class Writer:
    """Calls made one after the other; at most one is waiting or at work."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Have it called once the call before it is done; raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Until all calls are done; raises what the last one raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def copied(tensors: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    """Have tensors copied to RAM while other things are computed; the result waits for that, in any thread.

    Where all are in RAM already they are handed on as they are, and must stay as they are until they are written.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return lambda: tensors
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    done = torch.cuda.Event()
    done.record()

    def result() -> Mapping[str, Tensor]:
        done.synchronize()
        return copies

    return result


@contextmanager
def read_ahead(read: Callable[[int], T], count: int) -> Iterator[ReadAhead[T]]:
    """A `ReadAhead` whose thread ends with the context."""
    with _thread("read") as thread:
        yield ReadAhead(read, count, thread)


@contextmanager
def writer() -> Iterator[Writer]:
    """A `Writer`; leaving the context waits for it, and raises what its last call raised unless something else did."""
    with _thread("write") as thread:
        writing = Writer(thread)
        yield writing
        writing.wait()


def _thread(name: str) -> ThreadPoolExecutor:
    """A thread beside the main one that computes by itself.

    Where it had helpers of its own, OpenMP would see more threads than cores and let all of them sleep between any two
    operations: those of the main thread, which are short on a CPU, would take three times as long.
    """
    torch.get_num_threads()  # the number of the main thread is settled, before another says its own
    return ThreadPoolExecutor(1, name, torch.set_num_threads, (1,))
