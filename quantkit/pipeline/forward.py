# SPDX-License-Identifier: Apache-2.0
"""Two streams of the same tokens, one through the original model and one through the quantized, layer by layer.

What a run (`pipeline.run`) and a later look at its files (`remeasure`) have in common: opening streams, embedding
tokens, running a layer over a stream, and comparing the logits at the end. Both therefore compute the same figures.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from quantkit.calibration.tokens import TokenSet
from quantkit.dtypes import dtype_name, finite, torch_dtype
from quantkit.errors import NumericsError
from quantkit.hardware.batching import samples_per_sum
from quantkit.hardware.machine import return_freed_memory
from quantkit.hardware.matmul import mirror_
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.model.families import Site
from quantkit.model.shortcuts import Known, Shortcut, taken
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embed,
    embedding_names,
    logits,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
)
from quantkit.pipeline.activations import Stream, open_stream
from quantkit.stats import SiteStats, add_inputs, empty_stats, require_finite_stats
from quantkit.verdict import Comparison


class Progress(Protocol):
    """What a long run tells while it goes through the layers. See `progress` for the display."""

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None: ...
    def layer(self, index: int) -> None: ...
    def stage(self, name: str) -> None: ...
    def finished(self, index: int, loss: float, reused: bool) -> None: ...
    def ending(self, name: str) -> None: ...


def run_dtype(model: StreamedModel, device: torch.device, weight: str) -> torch.dtype:
    """Of hidden states and weights while running: as `weight` is stored, but 16-bit products are slow on CPUs."""
    return torch.float32 if device.type == "cpu" else torch_dtype(model.checkpoint.entries[weight].dtype)


def loaded(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on the device; floats in the dtype of the run."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def ending_names(model: StreamedModel) -> list[str]:
    """What has to be loaded to turn hidden states into logits: all outside the layers but an embedding of its own."""
    before = () if model.tied else model.before_layers()
    return [name for name in model.outside() if name not in before]


def open_states(
    model: StreamedModel,
    tokens: TokenSet,
    dtype: torch.dtype,
    device: torch.device,
    spill: Path,
    place: str | None = None,
    batch: int | None = None,
) -> Stream:
    """Room for the hidden states of a token set; see `activations.open_stream`."""
    return open_stream((tokens.samples, tokens.seqlen, model.config.hidden_size), dtype, device, spill, place, batch)


def embed_tokens(model: StreamedModel, tokens: TokenSet, stream: Stream, device: torch.device) -> None:
    """Fill a stream with what enters the first layer. Must run inside `outside_loaded`."""
    for batch in stream.batches():
        stream.states[batch] = embed(model, tokens.input_ids[batch].to(device)).to(stream.states.device)


def embed_original(model: StreamedModel, tokens: TokenSet, stream: Stream, device: torch.device) -> None:
    """Fill a stream with what enters the original's first layer."""
    with outside_loaded(model, loaded(read_outside(model, embedding_names(model)), device, stream.states.dtype)):
        embed_tokens(model, tokens, stream, device)


@contextmanager
def layer_loaded(model: StreamedModel, index: int, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Within it, layer `index` is materialised as it is in the original; it is dropped afterwards."""
    layer = model.layers[index]
    assign(layer, loaded(read_layer(model, index), device, dtype))
    try:
        yield layer
    finally:
        drop(layer)
        return_freed_memory()


def advance(
    model: StreamedModel,
    index: int,
    stream: Stream,
    *,
    first: int = 0,
    known: Mapping[Shortcut, Known] | None = None,
    exact: bool = True,
) -> None:
    """Run the materialised layer over a stream, in place.

    first: the sample to begin with; known: what is known of its linears, for all samples; exact: see
    `products.fast_linears`

    Raises:
        NumericsError: its output is not finite.
    """
    layer = model.layers[index]
    device = next(iter(layer.parameters())).device
    for batch in stream.batches(first=first):
        with taken(layer, {shortcut: found.of(batch) for shortcut, found in (known or {}).items()}):
            output = run_finite(model, index, stream.states[batch].to(device), exact=exact)
        stream.states[batch] = output


def run_finite(
    model: StreamedModel,
    index: int,
    hidden: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = True,
) -> Tensor:
    """As `run_layer`.

    Raises:
        NumericsError: its output is not finite.
    """
    output = run_layer(model, index, hidden, weights, exact=exact)
    if not finite(output):
        raise NumericsError(f"{model.layer_name(index)}: its output is not finite; check the model's weights")
    return output


def observe(model: StreamedModel, index: int, sites: Sequence[Site], stream: Stream) -> tuple[SiteStats, ...]:
    """Advance a stream through the materialised layer, and sum up what each site reads on the way: one run for all.

    Raises:
        NumericsError: an output or a site's inputs are not finite.
    """
    layer = model.layers[index]
    device = next(iter(layer.parameters())).device
    first = [layer.get_submodule(site.linears[0]) for site in sites]
    widths = [cast(Tensor, linear.weight).shape[1] for linear in first]
    found = tuple(empty_stats(width, device) for width in widths)
    at_once = samples_per_sum(stream.states.shape[1])
    waiting: list[list[Tensor]] = [[] for _ in sites]

    def add(number: int, at_least: int) -> None:
        """Sum up what waits in pieces of a fixed number of samples, so that memory does not decide the last bits."""
        while waiting[number] and sum(map(len, waiting[number])) >= at_least:
            together = torch.cat(waiting[number])
            add_inputs(found[number], together[:at_once])
            waiting[number] = [together[at_once:]] if len(together) > at_once else []

    def watch(number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            waiting[number].append(args[0])
            add(number, at_once)

        return see

    handles = [linear.register_forward_pre_hook(watch(number)) for number, linear in enumerate(first)]
    try:
        advance(model, index, stream)
    finally:
        for handle in handles:
            handle.remove()
    for number, stats in enumerate(found):
        add(number, 1)
        mirror_(stats.gram)
    for site, stats in zip(sites, found, strict=True):
        require_finite_stats(stats, f"{model.layer_name(index)}.{site.linears[0]}")
    return found


def relative_error(original: Stream, quantized: Stream, ranks: Ranks = ALONE) -> float:
    """||quantized - original||^2 / ||original||^2 of the hidden states of all ranks."""
    parts = []
    for batch in original.batches():
        reference = original.states[batch].float()
        difference = float((quantized.states[batch].float() - reference).square().sum())
        parts.append((difference, float(reference.square().sum())))
    found = ranks.gather(torch.tensor(parts, dtype=torch.float64))
    error, energy = (math.fsum(column) for column in found.T.tolist())
    return error / energy if energy > 0 else 0.0


def compare(
    model: StreamedModel,
    tokens: TokenSet,
    original: Stream,
    quantized: Stream,
    source: Mapping[str, Tensor],
    stored: Iterable[tuple[str, Tensor]],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The figures of `verify.Comparison`, from the streams that have left the last layer; see `compare_all`."""
    return compare_all(model, tokens, original, [quantized], source, stored, device, ranks)[0]


def compare_all(
    model: StreamedModel,
    tokens: TokenSet,
    original: Stream,
    quantized: Sequence[Stream],
    source: Mapping[str, Tensor],
    stored: Iterable[tuple[str, Tensor]],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """The figures of `verify.Comparison` for each quantized stream, and the dtype; all have left the last layer.

    source: the tensors outside the layers of the original, on the device in the dtype of the run; stored: those of the
    quantized models as files hold them, one after the other, because what is equal is held once; ranks: whose streams
    hold other samples, which count as well
    """
    quantized_outside = {}
    for name, tensor in stored:
        tensor = tensor.to(device, source[name].dtype)
        quantized_outside[name] = source[name] if torch.equal(tensor, source[name]) else tensor
    comparisons = [Comparison() for _ in quantized]
    for batch in original.batches():
        ids = tokens.input_ids[batch].to(device)
        with outside_loaded(model, source):
            reference = logits(model, original.states[batch].to(device))
        with outside_loaded(model, quantized_outside):
            for stream, comparison in zip(quantized, comparisons, strict=True):
                comparison.add(reference, logits(model, stream.states[batch].to(device)), ids)
    dtype = dtype_name(original.states.dtype)
    return [comparison.result(ranks.gather) | {"dtype": dtype} for comparison in comparisons]
