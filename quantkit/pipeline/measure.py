# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint measured against its original from the files of both, one decoder layer of each at a time.

The figures are those of a run (`pipeline.run`): the same streams, in the same batches, through the same functions. Peak
memory is one layer of each model and the hidden states, whatever the depth.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, shorten
from quantkit.errors import ModelError
from quantkit.formats import Format
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    embedding_names,
    move_buffers,
    outside_loaded,
    read_outside,
)
from quantkit.pipeline.activations import Stream, choose_place
from quantkit.pipeline.forward import (
    Progress,
    advance,
    compare,
    embed_original,
    embed_tokens,
    ending_names,
    layer_loaded,
    loaded,
    open_states,
    relative_error,
    run_dtype,
)
from quantkit.plan import OUTSIDE, LinearPlan
from quantkit.quantized import (
    changes_nothing,
    packed_names,
    parameters,
    quantization_of,
    read_config,
    read_dequantized,
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
    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters of the original architecture by their full names, dequantized."""
        ...


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on the disk: its tensors, format, and linears (the head's layer is -1)."""

    checkpoint: Checkpoint
    format: Format
    linears: tuple[LinearPlan, ...]

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
        return read_dequantized(
            self.checkpoint, [n for name in names for n in packed.get(name, [name])], linears, self.format, device
        )


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
    found = QuantizedCheckpoint(checkpoint, fmt, linears)
    _refuse_unknown(found, original)
    return found


def _refuse_another_model(directory: Path, raw: Mapping[str, Any], original: StreamedModel) -> None:
    for key in SAME:
        expected, found = getattr(original.config, key, None), raw.get(key)
        if found is not None and expected is not None and found != expected:
            raise ModelError(
                f"{directory}: config.json: {key} is {found!r:.60}, that of {original.directory} is {expected!r:.60}; "
                "it was made from another model"
            )


def _refuse_unknown(found: QuantizedCheckpoint, original: StreamedModel) -> None:
    """Every tensor must be one that is computed with, or one that changes nothing; and none may be missing."""
    packed = {f"{linear.name}.weight": packed_names(found.format, linear) for linear in found.linears}
    names = list(parameters(original))
    needed = {n for name in names for n in packed.get(name, [name])}
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


def _local(original: StreamedModel, index: int) -> list[str]:
    return list(original.layer_shapes(index))


def _open(
    model: StreamedModel,
    evaluation: TokenSet,
    dtype: torch.dtype,
    device: torch.device,
    out: Path,
    place: str | None,
    batch: int | None,
) -> tuple[Stream, Stream]:
    """Both streams, in a place that holds the two. A file that they are mapped from has no name, so none is left."""
    tokens = evaluation.samples * evaluation.seqlen
    place = place or choose_place(2 * tokens * model.config.hidden_size * dtype.itemsize, device)
    folder = out if os.access(out, os.W_OK) else Path(gettempdir())
    names = [f".quantkit-{name}-{os.getpid()}.tmp" for name in ("original", "quantized")]
    first, second = (open_states(model, evaluation, dtype, device, folder / name, place, batch) for name in names)
    return first, second


@torch.no_grad()
def measure(
    original: StreamedModel,
    quantized: Measurable,
    evaluation: TokenSet,
    device: torch.device,
    progress: Progress,
    place: str | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """The figures of `verify.Comparison.result`, and "layer_errors"; see `pipeline.run`.

    place: where hidden states live ("device", "ram", "file"; None lets memory decide); batch: samples at a time

    Raises:
        ModelError, NumericsError: a damaged file; values that are not finite.
    """
    model = original
    dtype = run_dtype(model, device, f"{quantized.linears[0].name}.weight")
    move_buffers(model.model, device)
    reference, stream = _open(model, evaluation, dtype, device, quantized.directory, place, batch)
    tokens = 2 * evaluation.samples * evaluation.seqlen
    progress.start(len(model.layers), tokens, {"evaluation": reference.place})
    embed_original(model, evaluation, reference, device)
    with outside_loaded(model, loaded(quantized.read(embedding_names(model)), device, dtype)):
        embed_tokens(model, evaluation, stream, device)
    layer_errors = []
    for index in range(len(model.layers)):
        progress.layer(index)
        progress.stage("run the original")
        with layer_loaded(model, index, device, dtype) as layer:
            advance(model, index, reference)
            progress.stage("run the quantized")
            prefix = f"{model.layer_name(index)}."
            stored = quantized.read([f"{prefix}{name}" for name in _local(model, index)], device)
            assign(layer, loaded({name.removeprefix(prefix): t for name, t in stored.items()}, device, dtype))
            del stored
            advance(model, index, stream)
        layer_errors.append({"layer": index, "relative_error": relative_error(reference, stream)})
        progress.finished(index, layer_errors[-1]["relative_error"], False)
    progress.ending("compare the logits")
    source = loaded(read_outside(model, ending_names(model)), device, dtype)
    outside = ((name, quantized.read([name])[name]) for name in source)
    figures = compare(model, evaluation, reference, stream, source, outside, device)
    return figures | {"layer_errors": layer_errors}
