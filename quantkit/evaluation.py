# SPDX-License-Identifier: Apache-2.0
"""Two streams of the same tokens, one through the original model and one through the quantized, layer by layer.

What a run (`pipeline`) and a later look at its files (`remeasure`) have in common: opening streams, embedding tokens,
running a layer over a stream, and comparing the logits at the end. Both therefore compute the same figures.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.activations import Stream, open_stream
from quantkit.calibration import TokenSet
from quantkit.dtypes import dtype_name, torch_dtype
from quantkit.errors import NumericsError
from quantkit.model.streaming import StreamedModel, embed, logits, outside_loaded, run_layer
from quantkit.verify import Comparison


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


def embedding_names(model: StreamedModel) -> list[str]:
    """What has to be loaded to embed tokens: all outside the layers but the head."""
    head = model.head_name
    return [name for name in model.outside() if not (head and name.startswith(f"{head}."))]


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


def advance(model: StreamedModel, index: int, stream: Stream) -> None:
    """Run the materialised layer over a stream, in place.

    Raises:
        NumericsError: its output is not finite.
    """
    device = next(iter(model.layers[index].parameters())).device
    for batch in stream.batches():
        output = run_layer(model, index, stream.states[batch].to(device))
        if not bool(torch.isfinite(output).all()):
            raise NumericsError(f"{model.layer_name(index)}: its output is not finite; check the model's weights")
        stream.states[batch] = output


def relative_error(original: Stream, quantized: Stream) -> float:
    """||quantized - original||^2 / ||original||^2 of the hidden states."""
    difference = energy = 0.0
    for batch in original.batches():
        reference = original.states[batch].float()
        difference += float((quantized.states[batch].float() - reference).square().sum())
        energy += float(reference.square().sum())
    return difference / energy if energy > 0 else 0.0


def compare(
    model: StreamedModel,
    tokens: TokenSet,
    original: Stream,
    quantized: Stream,
    source: Mapping[str, Tensor],
    stored: Iterable[tuple[str, Tensor]],
    device: torch.device,
) -> dict[str, Any]:
    """The figures of `verify.Comparison`, from the streams that have left the last layer, and the dtype of both.

    source: the tensors outside the layers of the original, on the device in the dtype of the run; stored: those of the
    quantized model as its files hold them, one after the other, because what is equal is held once
    """
    quantized_outside = {}
    for name, tensor in stored:
        tensor = tensor.to(device, source[name].dtype)
        quantized_outside[name] = source[name] if torch.equal(tensor, source[name]) else tensor
    comparison = Comparison()
    for batch in original.batches():
        with outside_loaded(model, source):
            reference = logits(model, original.states[batch].to(device))
        with outside_loaded(model, quantized_outside):
            found = logits(model, quantized.states[batch].to(device))
        comparison.add(reference, found, tokens.input_ids[batch].to(device))
    return comparison.result() | {"dtype": dtype_name(original.states.dtype)}
