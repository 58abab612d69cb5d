# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint measured against its original from the files of both, one decoder layer of each at a time.

The figures are those of a run (`pipeline.run`): the same streams, in the same batches, through the same functions. Peak
memory is one layer of each model and the hidden states, whatever the depth.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.model.shapes import Shapes
from quantkit.model.skeleton import Architecture
from quantkit.model.streaming import computing_as, drop, embedding_names, move_buffers, outside_loaded, read_outside
from quantkit.pipeline.compare import compare_logits, few_strange, largest, relative_error, strange_linears
from quantkit.pipeline.forward import Layer, embed_original, embed_tokens, ending_names, open_streams
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.walk import walk
from quantkit.plan import LinearPlan


class Measurable(Protocol):
    """A quantized model on the disk, whatever holds it."""

    @property
    def directory(self) -> Path: ...
    @property
    def model(self) -> Shapes:
        """The model that its own config or metadata describes, with modules."""
        ...

    @property
    def linears(self) -> tuple[LinearPlan, ...]: ...
    @property
    def served(self) -> str | None:
        """The dtype that an engine serves it in by itself; None: nothing says so."""
        ...

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters of the original architecture by their full names, dequantized."""
        ...


@torch.no_grad()
def measure(runtime: Runtime, quantized: Measurable, evaluation: TokenSet, progress: Progress) -> dict[str, Any]:
    """The figures of `metrics.Comparison`, and "layer_errors"; see `pipeline.run`.

    The original runs as its config says, and the quantized model as its own files say.

    runtime: of the original

    Raises:
        ModelError, NumericsError: a damaged file; values that are not finite.
    """
    assert isinstance(quantized.model, Architecture)
    model, own = runtime.model, computing_as(runtime.model, quantized.model)
    theirs = replace(runtime, model=own)
    for each in (model, own):
        move_buffers(each.model, runtime.device)
    opened = open_streams(runtime, {"original": evaluation, "quantized": evaluation})
    original, stream = opened["original"], opened["quantized"]
    progress.start(len(model.layers), 2 * evaluation.samples * evaluation.seqlen, {"evaluation": original.place})
    embed_original(runtime, evaluation, original)
    with outside_loaded(own, runtime.loaded(quantized.read(embedding_names(own)))):
        embed_tokens(theirs, evaluation, stream)
    layer_errors: list[dict[str, Any]] = []
    strange: list[dict[str, Any]] = []
    with walk(runtime, progress) as layers:
        for layer in layers:
            progress.stage("run the original")
            layer.advance(original)
            progress.stage("run the quantized")
            names = [f"{layer.name}.{name}" for name in model.layer_shapes(layer.index)]
            stored = quantized.read(names, runtime.device)
            local = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in stored.items()}
            strange += strange_linears(layer.weights, local, _linears_of(quantized, layer.index))
            layer.forget_original()
            drop(layer.module)
            copy = Layer(theirs, layer.index, progress)
            copy.load(local)
            del stored, local
            copy.advance(stream)
            drop(copy.module)
            error = relative_error(model, original, stream)
            layer_errors.append({"layer": layer.index, "relative_error": error})
            progress.finished(layer.index, error, False)
    progress.ending("compare the logits")
    source = runtime.loaded(read_outside(model, ending_names(model)))
    outside = ((name, quantized.read([name])[name]) for name in source)
    (figures,) = compare_logits(replace(runtime, quantized=own), evaluation, original, [stream], source, outside)
    peak = largest([original, stream])
    return figures | {
        "layer_errors": layer_errors,
        "vocabulary": model.config.vocab_size,
        **few_strange(strange, len(quantized.linears)),
        "largest_activation": peak.value,
        "torch_dtype": quantized.served,
    }


def _linears_of(quantized: Measurable, index: int) -> dict[str, LinearPlan]:
    return {linear.local: linear for linear in quantized.linears if linear.layer == index}
