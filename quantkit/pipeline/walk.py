# SPDX-License-Identifier: Apache-2.0
"""The walk over the layers: each is read, materialised, handed over, and dropped before the next one.

The next layer is read while one is in use. What is done with a layer is the caller's, in a plain loop:

    with walk(runtime, progress) as layers:
        for layer in layers:
            layer.advance(stream)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quantkit.hardware.machine import pin, return_freed_memory
from quantkit.model.family import Site
from quantkit.model.streaming import assign, drop, layer_room, read_layer
from quantkit.pipeline.forward import Layer
from quantkit.pipeline.prefetch import ReadAhead, read_ahead
from quantkit.pipeline.runtime import Progress, Runtime, Silent

STAGES = 4  # of a layer: it is read, the streams run through it, it is written; each site has two


@contextmanager
def walk(
    runtime: Runtime,
    progress: Progress | None = None,
    indices: Sequence[int] | None = None,
    sites: Sequence[Sequence[Site]] = (),
) -> Iterator[Iterator[Layer]]:
    """The layers of the original one after the other, each materialised; only one of them is.

    progress: is told of each layer; indices: which layers, in this order (all); sites: of each layer

    Raises:
        ModelError, NumericsError: a damaged file; a weight that is not finite.
    """
    order = range(len(runtime.model.layers)) if indices is None else indices
    with read_ahead(_reader(runtime, order), len(order)) as sources:
        yield _layers(runtime, progress or Silent(), order, sites, sources)


def _layers(
    runtime: Runtime,
    progress: Progress,
    order: Sequence[int],
    sites: Sequence[Sequence[Site]],
    sources: ReadAhead[dict[str, Tensor]],
) -> Iterator[Layer]:
    for index in order:
        own = sites[index] if sites else ()
        progress.layer(index, STAGES + 2 * len(own))
        progress.stage("read")
        source = sources.take()
        layer = Layer(runtime, index, progress, own, source, runtime.loaded(source))
        del source
        assign(layer.module, layer.weights)
        yield layer
        layer.forget_original()
        drop(layer.module)
        return_freed_memory()


def _reader(runtime: Runtime, order: Sequence[int]) -> Callable[[int], dict[str, Tensor]]:
    """Reads the layer at a position of the order, as stored (names local to it).

    For a GPU into pinned memory, which it copies from fastest: in turn into two places, as one layer is read while the
    one before it is in use. What outlives that must be a copy (`to_stored` makes one).
    """
    model = runtime.model
    if runtime.device.type != "cuda":
        return lambda position: read_layer(model, order[position])
    rooms = [torch.empty(layer_room(model), dtype=torch.uint8) for _ in range(2)]
    for room in rooms:
        pin(room)
    return lambda position: read_layer(model, order[position], rooms[position % 2])
