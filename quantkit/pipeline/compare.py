# SPDX-License-Identifier: Apache-2.0
"""How far the quantized model is from the original: after each layer, and by the logits at the end."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.dtypes import dtype_name
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.model.streaming import logits, outside_loaded
from quantkit.pipeline.activations import Peak, Stream
from quantkit.pipeline.metrics import Comparison
from quantkit.pipeline.runtime import Runtime


def relative_error(original: Stream, quantized: Stream, ranks: Ranks = ALONE) -> float:
    """||quantized - original||^2 / ||original||^2 of the hidden states of all ranks."""
    parts = []
    for batch in original.batches():
        reference = original.states[batch].float()
        difference = float((quantized.states[batch].float() - reference).square().sum())
        parts.append((difference, float(reference.square().sum())))
    sums = ranks.gather(torch.tensor(parts, dtype=torch.float64))
    error, energy = (math.fsum(column) for column in sums.T.tolist())
    return error / energy if energy > 0 else 0.0


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
    outside = {}
    for name, tensor in stored:
        tensor = tensor.to(device, source[name].dtype)
        outside[name] = source[name] if torch.equal(tensor, source[name]) else tensor
    comparisons = [Comparison() for _ in quantized]
    for batch in original.batches():
        ids = tokens.input_ids[batch].to(device)
        with outside_loaded(model, source):
            reference = logits(model, original.states[batch].to(device))
        with outside_loaded(model, outside):
            for stream, comparison in zip(quantized, comparisons, strict=True):
                comparison.add(reference, logits(model, stream.states[batch].to(device)), ids)
    dtype = dtype_name(original.states.dtype)
    return [comparison.result(runtime.ranks.gather) | {"dtype": dtype} for comparison in comparisons]
