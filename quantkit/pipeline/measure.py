# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint measured against its original from the files of both, one decoder layer of each at a time.

The figures are those of a run (`pipeline.run`): the same streams, in the same batches, through the same functions. Peak
memory is one layer of each model and the hidden states, whatever the depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, shorten
from quantkit.dtypes import as_served
from quantkit.errors import ModelError
from quantkit.formats import Format
from quantkit.model.shapes import text_values
from quantkit.model.streaming import (
    StreamedModel,
    embedding_names,
    move_buffers,
    outside_loaded,
    read_outside,
)
from quantkit.pipeline.compare import compare_logits, few_strange, largest, relative_error, strange_linears
from quantkit.pipeline.forward import embed_original, embed_tokens, ending_names, open_streams
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.walk import walk
from quantkit.plan import OUTSIDE, LinearPlan
from quantkit.quantized import (
    changes_nothing,
    dequantized,
    packed_names,
    parameters,
    quantization_of,
    read_config,
    served_dtype,
    stored_linears,
)

# What must be the same in both config.json: tensors of equal shape can still be of another model.
SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


class Measurable(Protocol):
    """A quantized model on the disk, whatever holds it."""

    @property
    def directory(self) -> Path: ...
    @property
    def linears(self) -> tuple[LinearPlan, ...]: ...
    @property
    def served(self) -> str | None:
        """The dtype that an engine serves it in by itself; None: nothing says so."""
        ...

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters of the original architecture by their full names, dequantized."""
        ...


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on the disk: its tensors, format, and linears (the head's layer is -1).

    served: the dtype that its config.json names
    cast: the dtype that all floats of its files are cast to before they stand for anything (None: as they are), as an
        engine does; see `pipeline.run`
    """

    checkpoint: Checkpoint
    format: Format
    linears: tuple[LinearPlan, ...]
    served: str | None = None
    cast: str | None = None

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def files(self) -> list[str]:
        return self.checkpoint.files

    @property
    def decoder(self) -> tuple[LinearPlan, ...]:
        """The linears of the decoder layers."""
        return tuple(linear for linear in self.linears if linear.layer != OUTSIDE)

    @property
    def bits_per_weight(self) -> float:
        """Every stored bit of the quantized linears over their weights."""
        quantized = [linear for linear in self.linears if linear.scheme is not None]
        names = [name for linear in quantized for name in packed_names(self.format, linear)]
        weights = sum(linear.out_features * linear.in_features for linear in quantized)
        return 8 * sum(self.checkpoint.entries[name].nbytes for name in names) / weights

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters of the original architecture by their full names; quantized weights come dequantized."""
        wanted = set(names)
        linears = [x for x in self.linears if x.scheme is not None and f"{x.name}.weight" in wanted]
        packed = {f"{linear.name}.weight": packed_names(self.format, linear) for linear in linears}
        stored = self.checkpoint.read_many([n for name in names for n in packed.get(name, [name])], device)
        return dequantized(as_served(stored, self.cast), linears, self.format)


def open_quantized(directory: Path, original: StreamedModel) -> QuantizedCheckpoint:
    """Read the headers and config of a quantized checkpoint and hold them against the model that it was made from.

    Raises:
        ModelError: not quantized, a kind that is not supported, a damaged checkpoint, or one of another model.
    """
    raw = read_config(directory)
    quantization = quantization_of(raw)
    if not quantization:
        raise ModelError(f"{directory}: config.json has no quantization_config; expected a quantized checkpoint")
    _refuse_another_model(directory, raw, original)
    checkpoint = open_checkpoint(directory)
    fmt, linears = stored_linears(original, checkpoint, quantization)
    if all(linear.scheme is None for linear in linears):
        raise ModelError(f"{directory}: every linear is stored in 16 bit; expected a quantized checkpoint")
    found = QuantizedCheckpoint(checkpoint, fmt, linears, served_dtype(raw))
    _refuse_unknown(found, original)
    return found


def _refuse_another_model(directory: Path, raw: Mapping[str, Any], original: StreamedModel) -> None:
    for key in SAME:
        expected, found = getattr(original.config, key, None), text_values(raw).get(key)
        if found is not None and expected is not None and found != expected:
            raise ModelError(
                f"{directory}: config.json: {key} is {found!r:.60}, that of {original.directory} is {expected!r:.60}; "
                "it was made from another model"
            )


def _refuse_unknown(found: QuantizedCheckpoint, original: StreamedModel) -> None:
    """Every tensor must be one that is computed with, or one that changes nothing; and none may be missing."""
    packed = {f"{linear.name}.weight": packed_names(found.format, linear) for linear in found.linears}
    names = list(parameters(original))
    needed = {n for name in names for n in packed.get(name, [name])} | original.copied.keys()
    there = set(found.checkpoint.entries)
    if missing := sorted(needed - there):
        raise ModelError(f"{found.checkpoint.directory}: {len(missing)} tensors missing ({shorten(missing)})")
    for name in names:
        shape = found.checkpoint.entries[name].shape if name in needed else None
        if shape is not None and shape != original.checkpoint.entries[name].shape:
            expected = list(original.checkpoint.entries[name].shape)
            raise ModelError(f"{found.checkpoint.directory}: {name}: expected {expected}, got {list(shape)}")
    unknown = [
        name
        for name in sorted(there - needed - set(original.ignored))
        if not changes_nothing(original, found.checkpoint, found.linears, name)
    ]
    if unknown:
        raise ModelError(
            f"{found.checkpoint.directory}: {len(unknown)} tensors have no place in the original model "
            f"({shorten(unknown)}); without them the figures would be wrong"
        )


@torch.no_grad()
def measure(runtime: Runtime, quantized: Measurable, evaluation: TokenSet, progress: Progress) -> dict[str, Any]:
    """The figures of `metrics.Comparison`, and "layer_errors"; see `pipeline.run`.

    runtime: of the original

    Raises:
        ModelError, NumericsError: a damaged file; values that are not finite.
    """
    model = runtime.model
    move_buffers(model.model, runtime.device)
    opened = open_streams(runtime, {"original": evaluation, "quantized": evaluation})
    original, stream = opened["original"], opened["quantized"]
    progress.start(len(model.layers), 2 * evaluation.samples * evaluation.seqlen, {"evaluation": original.place})
    embed_original(runtime, evaluation, original)
    with outside_loaded(model, runtime.loaded(quantized.read(embedding_names(model)))):
        embed_tokens(runtime, evaluation, stream)
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
            layer.load(local)
            del stored, local
            layer.advance(stream)
            error = relative_error(original, stream)
            layer_errors.append({"layer": layer.index, "relative_error": error})
            progress.finished(layer.index, error, False)
    progress.ending("compare the logits")
    source = runtime.loaded(read_outside(model, ending_names(model)))
    outside = ((name, quantized.read([name])[name]) for name in source)
    (figures,) = compare_logits(runtime, evaluation, original, [stream], source, outside)
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
