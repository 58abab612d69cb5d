# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint as one GGUF file, its integers as they are.

One tensor is in memory at a time. Linears that are quantized keep their codes and scales (see `formats.gguf`); what is
stored in 16 bit stays float16; norms and biases become float32, as llama.cpp wants them. What was measured of the
checkpoint is then true of the file, but for the 8-bit activations that llama.cpp's CPU kernels round to.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, open_file, require_finite
from quantkit.dtypes import dtype_name, to_stored
from quantkit.errors import OutputError, SchemeError
from quantkit.formats.blocks import dequantize_blocks, inexact_lows, pack, pack_superblocks
from quantkit.formats.gguf import INTEGER_TYPES, K_TYPES, OUTSIDE_TYPES, TYPES, type_of, why_not
from quantkit.gguf.architecture import (
    ROPE_FACTORS,
    check_architecture,
    gguf_of,
    hyperparameters,
    permutation,
    rope_factors,
    tensor_name,
)
from quantkit.gguf.file import TensorInfo, Value, file_bytes, open_gguf, write_gguf
from quantkit.gguf.tokenizer import tokenizer_metadata
from quantkit.grids.registry import dequantize
from quantkit.methods import rtn
from quantkit.model.shapes import Shapes
from quantkit.model.streaming import StreamedModel
from quantkit.plan import LinearPlan, Plan
from quantkit.quantized import QuantizedCheckpoint, architecture_in, open_quantized, packed_names, require_complete
from quantkit.scheme import NAMED, QuantizedTensor, Scheme

ROWS_BYTES = 2**25  # of a wide tensor that is read, rounded and written at a time
QUANTIZATION_VERSION = 2
NOTES = ("LICENSE*", "NOTICE*")  # files that go with a .gguf; the rest is in it


@dataclass(frozen=True)
class Layout:
    """The file before it exists: its metadata, its tensors in order, and where each comes from.

    sources: name in the file -> name of the parameter ("" for what is computed)
    """

    metadata: dict[str, Value]
    infos: tuple[TensorInfo, ...]
    sources: Mapping[str, str]

    @property
    def file_bytes(self) -> int:
        return file_bytes(self.metadata, self.infos)


@dataclass(frozen=True)
class Exported:
    """What was written. equal: linears whose integers went in as they are; rounded: names of those with a loss, and

    the relative error of their weights, |W' - W| / |W|.
    """

    path: Path
    sha256: str
    nbytes: int
    types: dict[str, str]
    equal: int
    rounded: dict[str, float]


def open_source(directory: Path) -> QuantizedCheckpoint:
    """A quantized checkpoint of any tool whose model has a place in a GGUF file.

    Raises:
        ModelError: see `open_quantized`, `require_complete` and `check_architecture`.
    """
    source = open_quantized(directory, architecture_in)
    check_architecture(source.model)
    require_complete(source)
    return source


def planned_source(model: StreamedModel, plan: Plan, out: Path) -> QuantizedCheckpoint:
    """The shards of a run in `out`, which have no config.json of their own."""
    entries = {name: entry for shard in plan.shards for name, entry in open_file(out / shard.file).entries.items()}
    raw = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
    return QuantizedCheckpoint(model.directory, raw, model, Checkpoint(out, entries), plan.format, plan.quantized)


def export(
    source: QuantizedCheckpoint,
    destination: Path,
    type: str | None = None,
    *,
    outside: str = "f16",
    requantize: bool = False,
    name: str | None = None,
) -> Exported:
    """Write a quantized checkpoint as one GGUF file.

    type: of the quantized linears; None: the smallest that each one's integers fit
    outside: of the embedding and the head where they are stored in 16 bit: f16, q8_0 or q6_k
    requantize: accept what loses something (q4_1's rounding of -zero * scale, another type), and say how much

    Raises:
        SchemeError: integers that the type does not hold, before anything is written; a type that is not known.
        ModelError: a checkpoint or tokenizer that is not supported. OutputError: the file cannot be written.
    """
    types = types_of(source, type, requantize)
    if not requantize:
        _require_exact(source, types)
    made = layout(source.model, source.raw, source.directory, types, outside, name)
    exported = Exported(destination, "", made.file_bytes, types, 0, {})

    def data() -> Iterator[tuple[str, Iterator[Tensor]]]:
        for info in made.infos:
            yield info.name, _pieces(source, made.sources[info.name], info, exported)

    sha256 = write_gguf(destination, made.metadata, made.infos, data())
    _require_equal(source, destination, set(types) - set(exported.rounded))
    return replace(exported, sha256=sha256, equal=len(types) - len(exported.rounded))


def layout(
    architecture: Shapes,
    config: Mapping[str, Any],
    directory: Path,
    types: Mapping[str, str],
    outside: str,
    name: str | None = None,
) -> Layout:
    """Plan the file of a model whose linears have these types (by full name; the others stay float16).

    Raises:
        SchemeError: a type that is not known, or whose blocks do not divide the rows.
        ModelError: a parameter without a place in the file; a tokenizer that is not supported.
    """
    if outside not in OUTSIDE_TYPES:
        raise SchemeError(f"type of the embedding and the head: expected {', '.join(OUTSIDE_TYPES)}, got {outside!r}")
    settings = architecture.config
    infos, sources = [], {}
    factors = rope_factors(settings)
    if factors is not None:
        infos.append(TensorInfo(ROPE_FACTORS, "f32", tuple(factors.shape)))
        sources[ROPE_FACTORS] = ""
    for parameter, shape in _parameters(architecture).items():
        kind = types.get(parameter.removesuffix(".weight"))
        if kind is None:
            wide = len(shape) > 1
            inner = parameter.startswith(f"{architecture.layers_name}.")
            kind = ("f16" if inner else outside) if wide else "f32"
        if shape[-1] % TYPES[kind].columns:
            raise SchemeError(f"{parameter}: rows of {shape[-1]} are no whole blocks of {kind}; use another type")
        stored = tensor_name(architecture, parameter)
        infos.append(TensorInfo(stored, kind, shape))
        sources[stored] = parameter
    kinds = [types[linear] for linear in types]
    most = max(sorted(set(kinds)), key=kinds.count)
    metadata: dict[str, Value] = {
        "general.architecture": gguf_of(architecture).name,
        "general.type": "model",
        "general.name": name or directory.resolve().name,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": TYPES[most].file_type,
        "general.quantized_by": "quantkit",
    }
    metadata |= hyperparameters(architecture)
    metadata |= tokenizer_metadata(directory, settings.vocab_size, config)
    return Layout(metadata, tuple(infos), sources)


def _parameters(architecture: Shapes) -> dict[str, tuple[int, ...]]:
    """Every parameter and its shape: the embedding, the layers in order, what comes after them."""
    found = dict(architecture.before_layers())
    for index in range(len(architecture.layer_tensors)):
        prefix = architecture.layer_name(index)
        found |= {f"{prefix}.{name}": shape for name, shape in architecture.layer_shapes(index).items()}
    return found | architecture.after_layers()


def types_of(source: QuantizedCheckpoint, wanted: str | None, requantize: bool = False) -> dict[str, str]:
    """The type that each quantized linear of a checkpoint gets; see `export`."""
    return {linear.name: _type_of(linear, wanted, requantize) for linear in source.quantized}


def _type_of(linear: LinearPlan, wanted: str | None, requantize: bool) -> str:
    assert linear.scheme is not None
    if wanted is not None and wanted not in TYPES:
        raise SchemeError(f"--type: expected {', '.join(TYPES)}, got {wanted!r}")
    try:
        found = wanted or type_of(linear.scheme)
        reason = _why_not(linear, found)
    except SchemeError as error:
        raise SchemeError(f"{linear.name}: {error}") from error
    if reason is not None and not requantize:
        more = "; from the 16-bit model it can be made without rounding twice" if found not in INTEGER_TYPES else ""
        raise SchemeError(f"{linear.name}: {reason}{more}, or accept a loss with --requantize")
    return found


def _why_not(linear: LinearPlan, kind: str) -> str | None:
    assert linear.scheme is not None
    if linear.scheme.grid in K_TYPES:
        return None if kind == linear.scheme.grid else f"{linear.scheme} is no {kind}; leave out --type"
    return why_not(linear.scheme, linear.out_features, linear.in_features, kind)


def _require_exact(source: QuantizedCheckpoint, types: Mapping[str, str]) -> None:
    """Before a byte is written: no groups of scattered columns, no scales and no q4_1 whose -zero * scale float16 does
    not hold.
    """
    for linear in source.quantized:
        assert linear.scheme is not None
        if linear.scheme.grid in K_TYPES:
            continue
        specs = source.format.specs(linear.scheme, linear.out_features, linear.in_features)
        stored = [source.checkpoint.entries[name].dtype for name in packed_names(source.format, linear)]
        half = not {"bfloat16", "float32"} & set(stored)  # scales: they may not be what float16 holds
        if "g_idx" not in specs and half and types[linear.name] != "q4_1":
            continue
        quantized = _read_quantized(source, linear)
        if quantized.g_idx is not None:
            raise SchemeError(
                f"{linear.name}: act-order (g_idx): groups of columns that are not side by side, as gguf's blocks are; "
                "--requantize rounds it again"
            )
        if types[linear.name] == "q4_1":
            count, groups = inexact_lows(quantized), quantized.scales.numel()
            if count:
                raise SchemeError(
                    f"{linear.name}: q4_1 stores -zero * scale in float16, which is inexact in {count} of {groups} "
                    "groups (by less than 2^-11 of it); --requantize accepts that, --type q8_0 holds the integers "
                    "exactly, and a run with --format gguf makes scales that fit"
                )


def _require_equal(source: QuantizedCheckpoint, path: Path, names: set[str]) -> None:
    """Read the file back: the weights of linears that lost nothing are those of the checkpoint, bit for bit."""
    written = open_gguf(path)
    for linear in sorted(source.quantized, key=lambda linear: linear.name):
        if linear.name not in names:
            continue
        parameter = f"{linear.name}.weight"
        weight = dequantize(_read_quantized(source, linear))
        order = permutation(source.model, parameter, len(weight))
        stored = written.read(tensor_name(source.model, parameter))
        if not torch.equal(stored, weight if order is None else weight[order]):
            raise OutputError(
                f"{path}: {linear.name}: read back, its weights are not those that were written; is the disk sound?"
            )


def _read_quantized(source: QuantizedCheckpoint, linear: LinearPlan) -> QuantizedTensor:
    assert linear.scheme is not None
    found = source.read_quantized(linear)
    if linear.scheme.grid in K_TYPES:
        return found
    scales = found.scales.to(torch.float16)
    if not torch.equal(scales.float(), found.scales.float()):
        raise SchemeError(
            f"{linear.name}: scales in {dtype_name(found.scales.dtype)} that gguf's float16 does not hold; "
            "`quantkit convert --to gptq_v2 --requantize` rounds them first"
        )
    return replace(found, scales=scales)


def _pieces(source: QuantizedCheckpoint, parameter: str, info: TensorInfo, exported: Exported) -> Iterator[Tensor]:
    """The bytes of one tensor of the file."""
    model = source.model
    if not parameter:
        factors = rope_factors(model.config)
        assert factors is not None
        yield factors
        return
    linear = next((x for x in source.quantized if f"{x.name}.weight" == parameter), None)
    order = permutation(model, parameter, info.shape[0])
    if linear is None:
        for rows in read_rows(source.checkpoint, parameter):
            require_finite(parameter, rows, source.directory)
            yield encode_rows(parameter, rows if order is None else rows[order], info.type)
        return
    blocks = _linear_blocks(_read_quantized(source, linear), linear.name, info.type, exported)
    yield blocks if order is None else blocks[order]


def _linear_blocks(quantized: QuantizedTensor, name: str, kind: str, exported: Exported) -> Tensor:
    if quantized.scheme.grid in K_TYPES:
        return pack_superblocks(quantized)
    fits = why_not(quantized.scheme, quantized.out_features, quantized.in_features, kind) is None
    if fits and quantized.g_idx is None and not (kind == "q4_1" and inexact_lows(quantized)):
        return pack(quantized, kind)
    weight = dequantize(quantized)
    loses_little = fits and quantized.g_idx is None
    blocks = pack(quantized, kind, exact=False) if loses_little else encode_rows(name, weight, kind)
    difference = dequantize_blocks(blocks, kind) - weight
    exported.rounded[name] = float(difference.norm() / weight.norm().clamp(min=1e-30))
    return blocks


def read_rows(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A stored tensor, a number of rows at a time where it is wide; whole where its rows are few or are vectors."""
    entry = checkpoint.entries.get(name)
    if entry is None or len(entry.shape) < 2 or entry.nbytes <= 2 * ROWS_BYTES:
        yield checkpoint.read(name)
        return
    row_bytes = entry.nbytes // entry.shape[0]
    step = max(1, ROWS_BYTES // row_bytes)
    for begin in range(0, entry.shape[0], step):
        count = min(step, entry.shape[0] - begin)
        offset, shape = entry.offset + begin * row_bytes, (count, *entry.shape[1:])
        part = replace(entry, shape=shape, offset=offset, nbytes=count * row_bytes)
        yield Checkpoint(checkpoint.directory, {name: part}).read(name)


def encode_rows(name: str, rows: Tensor, kind: str) -> Tensor:
    """Values as a type stores them; those of 4 to 8 bits rounded to the nearest, all columns alike.

    Raises:
        NumericsError: a value beyond float16.
    """
    if kind == "f32":
        return rows.float()
    if kind == "f16":
        return to_stored(name, rows)
    if kind in K_TYPES:
        return pack_superblocks(rtn.quantize(rows, NAMED[kind]))
    scheme = Scheme(8 if kind == "q8_0" else 4, 32, kind != "q4_1")
    return pack(rtn.quantize(rows, scheme, search=kind != "q8_0"), kind, exact=False)
