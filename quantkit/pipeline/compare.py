# SPDX-License-Identifier: Apache-2.0
"""How far the quantized model is from the original: by its weights, after each layer, and by the logits at the end."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.dtypes import dtype_name
from quantkit.grids.integer import INTEGER
from quantkit.grids.registry import GRIDS, dequantize
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.methods import rtn
from quantkit.model.streaming import StreamedModel, hidden_of, logits, outside_loaded
from quantkit.pipeline.activations import Peak, Stream
from quantkit.pipeline.metrics import Comparison
from quantkit.pipeline.runtime import Runtime
from quantkit.plan import LinearPlan
from quantkit.scheme import Scheme

# Sound roundings have a relative error of up to 0.25; integers of another weight or in another order 0.97 and more,
# whatever the bits (docs/verdict.md). GPTQ may move weights far where inputs are alike: the limit is nearer the latter.
STRANGE_ERROR = 0.7


def relative_error(model: StreamedModel, original: Stream, quantized: Stream, ranks: Ranks = ALONE) -> float:
    """||quantized - original||^2 / ||original||^2 of the hidden states of all ranks."""
    parts = []
    for batch in original.batches():
        reference, found = (hidden_of(model, stream.states[batch]).float() for stream in (original, quantized))
        difference = float((found - reference).square().sum())
        parts.append((difference, float(reference.square().sum())))
    sums = ranks.gather(torch.tensor(parts, dtype=torch.float64))
    error, energy = (math.fsum(column) for column in sums.T.tolist())
    return error / energy if energy > 0 else 0.0


def weight_error(original: Tensor, weight: Tensor) -> float:
    """The share of a weight's energy [out, in] that the original, scaled by rows and columns, does not account for.

    Folds scale columns, and the rows of what feeds another linear, so scales of either kind are no error.
    """
    w, q = original.float(), weight.float()
    rows, columns = w.new_ones(len(w), 1), w.new_ones(1, w.shape[1])
    for _ in range(3):
        scaled = w * rows
        columns = (scaled * q).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True).clamp(min=1e-30)
        scaled = w * columns
        rows = (scaled * q).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp(min=1e-30)
    energy, found = w.square().sum(1), q.square().sum(1)
    explained = (scaled * q).sum(1).square() / (scaled.square().sum(1) * found).clamp(min=1e-30)
    return float(((1 - explained) * energy).sum() / energy.sum().clamp(min=1e-30))


def strange_linears(
    original: Mapping[str, Tensor], quantized: Mapping[str, Tensor], linears: Mapping[str, LinearPlan]
) -> list[dict[str, Any]]:
    """The linears of a layer whose weights cannot be a rounding of the original's; see `records.StrangeLinear`.

    original, quantized: the layer's tensors; linears: those of the layer; all by their local names
    """
    strange = []
    for name, linear in linears.items():
        w, q = (tensors.get(f"{name}.weight") for tensors in (original, quantized))
        if linear.scheme is None or w is None or q is None:
            continue
        if _relative(q, w) <= STRANGE_ERROR or (error := weight_error(w, q)) <= STRANGE_ERROR:
            continue
        nearest = dequantize(rtn.quantize(w.float(), _as_rounded(linear.scheme), search=False))
        strange.append({"name": linear.name, "error": error, "expected": _relative(nearest, w)})
    return strange


def _as_rounded(scheme: Scheme) -> Scheme:
    """The scheme, or integers of as many bits for a grid that is read and not rounded to."""
    return scheme if scheme.grid in GRIDS else replace(scheme, grid=INTEGER.name)


def few_strange(strange: list[dict[str, Any]], linears: int) -> dict[str, Any]:
    """What a verification says of strange linears. If most are, the model was rotated: only its outputs can tell."""
    return {"strange_linears": strange} if 0 < len(strange) <= linears / 2 else {}


def _relative(weight: Tensor, original: Tensor) -> float:
    w = original.to(weight.device).float()
    return float((weight.float() - w).square().sum() / w.square().sum().clamp(min=1e-30))


def largest(streams: Sequence[Stream], ranks: Ranks = ALONE) -> Peak:
    """The largest magnitude that streams of any rank have met in the layers."""
    peaks = [stream.peak for stream in streams]
    values = ranks.gather(torch.tensor([[peak.value for peak in peaks]], dtype=torch.float64)).max(0).values.tolist()
    value = max(values, default=0.0)
    return Peak(value, next((peak.where for peak in peaks if peak.value == value), ""))


def compare_logits(
    runtime: Runtime,
    tokens: TokenSet,
    original: Stream,
    quantized: Sequence[Stream],
    source: Mapping[str, Tensor],
    stored: Iterable[tuple[str, Tensor]],
) -> list[dict[str, Any]]:
    """The figures of `metrics.Comparison` for each quantized stream, and the dtype.

    All streams have left the last layer. Those of other ranks hold other samples, which count as well.

    source: the tensors outside the layers of the original, on the device in the dtype of the run
    stored: those of the quantized models as files hold them, one after the other, because what is equal is held once
    """
    model, device = runtime.model, runtime.device
    theirs = runtime.quantized or model
    outside = {}
    for name, tensor in stored:
        tensor = tensor.to(device, source[name].dtype)
        outside[name] = source[name] if torch.equal(tensor, source[name]) else tensor
    comparisons = [Comparison() for _ in quantized]
    for batch in original.batches():
        ids = tokens.input_ids[batch].to(device)
        with outside_loaded(model, source):
            reference = logits(model, original.states[batch].to(device))
        with outside_loaded(theirs, outside):
            for stream, comparison in zip(quantized, comparisons, strict=True):
                comparison.add(reference, logits(theirs, stream.states[batch].to(device)), ids)
    dtype = dtype_name(original.states.dtype)
    return [comparison.result(runtime.ranks.gather) | {"dtype": dtype} for comparison in comparisons]
