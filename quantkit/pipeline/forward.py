# SPDX-License-Identifier: Apache-2.0
"""The forward pass of token streams: they are opened, embedded, and run through one layer after the other.

A run (`pipeline.run`) and a later look at its files (`pipeline.measure`) use the same functions, and therefore compute
the same figures.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor, nn

from quantkit.calibration.tokens import TokenSet
from quantkit.dtypes import finite
from quantkit.errors import NumericsError
from quantkit.model.family import Site
from quantkit.model.shortcuts import Known, Shortcut, taken
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    embed,
    embedding_names,
    outside_loaded,
    read_outside,
    run_layer,
)
from quantkit.pipeline.activations import Stream, choose_place, open_stream
from quantkit.pipeline.runtime import Progress, Runtime


@dataclass(frozen=True)
class Layer:
    """A decoder layer that is materialised; names of tensors are local to it.

    sites: its sites, where they are asked for
    source: its tensors as the original stores them
    weights: the same on the device, as the original runs with them
    """

    runtime: Runtime
    index: int
    progress: Progress
    sites: Sequence[Site] = ()
    source: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.runtime.model.layers[self.index]

    @property
    def name(self) -> str:
        """The full name, for example "model.layers.3"."""
        return self.runtime.model.layer_name(self.index)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the layer these tensors, on the device and in the dtype of the run."""
        assign(self.module, self.runtime.loaded(tensors))

    def forget_original(self) -> None:
        """Free the memory of the original's tensors, which nothing will ask for again."""
        self.source.clear()
        self.weights.clear()

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None, *, exact: bool = True) -> Tensor:
        """As `run_layer`.

        Raises:
            NumericsError: the output is not finite.
        """
        output = run_layer(self.runtime.model, self.index, hidden, weights, exact=exact)
        if not finite(output):
            raise NumericsError(f"{self.name}: its output is not finite; check the model's weights")
        return output

    def advance(self, stream: Stream, *, first: int = 0, known: Mapping[Shortcut, Known] | None = None) -> None:
        """Run the layer over a stream, in place.

        first: the sample to begin with
        known: what linears read or return, for all samples; what comes before them is not run again

        Raises:
            NumericsError: an output is not finite.
        """
        with _inputs_seen(self.module) as ends:
            for batch in stream.batches(first=first):
                with taken(self.module, {shortcut: tensors.of(batch) for shortcut, tensors in (known or {}).items()}):
                    output = self.run(stream.states[batch].to(self.runtime.device), exact=stream.exact)
                ends.extend(end.float() for end in torch.aminmax(output))
                stream.states[batch] = output
        if ends:
            stream.peak.see(float(torch.stack(ends).abs().max()), self.name)


@contextmanager
def _inputs_seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the least and the greatest number that linears of the module read are added to the list."""
    ends: list[Tensor] = []
    last: ref[Tensor] | None = None

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal last
        if last is None or last() is not args[0]:  # linears of a site read the same tensor
            ends.extend(end.float() for end in torch.aminmax(args[0]))
            last = ref(args[0])

    handles = [each.register_forward_pre_hook(see) for each in module.modules() if isinstance(each, nn.Linear)]
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()


def ending_names(model: StreamedModel) -> list[str]:
    """What has to be loaded to turn hidden states into logits: all outside the layers but an embedding of its own."""
    before = () if model.tied else model.before_layers()
    return [name for name in model.outside() if name not in before]


def open_states(runtime: Runtime, tokens: TokenSet, name: str, place: str | None = None) -> Stream:
    """Room for the hidden states of a token set; see `activations.open_stream`.

    name: of the stream, for its file; place: where it lives, if not where the runtime says
    """
    shape = tokens.samples, tokens.seqlen, runtime.model.state_width
    spill = runtime.folder / f".{name}-states-{runtime.ranks.rank}-{os.getpid()}.tmp"
    memory = runtime.memory
    return open_stream(shape, runtime.dtype, runtime.device, spill, place or memory.place, memory.batch)


def open_streams(runtime: Runtime, tokens: Mapping[str, TokenSet]) -> dict[str, Stream]:
    """Room for several token sets by name, all in one place that holds them together.

    The place is decided once for their sum, as memory that is not touched yet still counts as free.
    """
    numbers = sum(each.input_ids.numel() for each in tokens.values()) * runtime.model.state_width
    place = runtime.memory.place or choose_place(numbers * runtime.dtype.itemsize, runtime.device)
    return {name: open_states(runtime, each, name, place) for name, each in tokens.items()}


def embed_tokens(runtime: Runtime, tokens: TokenSet, stream: Stream) -> None:
    """Fill a stream with what enters the first layer. Must run inside `outside_loaded`."""
    for batch in stream.batches():
        hidden = embed(runtime.model, tokens.input_ids[batch].to(runtime.device))
        stream.states[batch] = hidden.to(stream.states.device)


def embed_original(runtime: Runtime, tokens: TokenSet, stream: Stream) -> None:
    """Fill a stream with what enters the original's first layer."""
    names = embedding_names(runtime.model)
    with outside_loaded(runtime.model, runtime.loaded(read_outside(runtime.model, names))):
        embed_tokens(runtime, tokens, stream)
