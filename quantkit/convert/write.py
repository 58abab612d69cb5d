# SPDX-License-Identifier: Apache-2.0
"""One file after the other: it is written, read back, and compared with what it was made of."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.journal import Unit
from quantkit.checkpoint.reader import Checkpoint, open_file
from quantkit.checkpoint.writer import write_pieces
from quantkit.convert.plan import Conversion
from quantkit.convert.survey import blocks_of
from quantkit.convert.targets import Target, spec_arguments
from quantkit.dtypes import dtype_name, to_stored, torch_dtype
from quantkit.errors import OutputError
from quantkit.formats import Format
from quantkit.grids.base import to_float16
from quantkit.grids.registry import dequantize
from quantkit.hardware.machine import return_freed_memory
from quantkit.methods import rtn
from quantkit.plan import ShardPlan
from quantkit.quantized import packed_names, unpacked
from quantkit.scheme import QuantizedTensor, name_of

WEIGHTS_AT_ONCE = 1 << 22  # as floats


def write_unit(conversion: Conversion, shard: ShardPlan) -> Unit:
    """Write a shard, read it back, and compare or measure.

    Raises:
        ModelError, NumericsError: a damaged source, or values that the target cannot hold.
        OutputError: the disk is full, or what was read back is not what was written.
    """
    owners = {name.rpartition(".")[0] for name in shard.tensors}
    targets = {t.linear.name: t for t in conversion.targets if t.before.scheme and t.linear.name in owners}
    packed: dict[str, Tensor] = {}

    def pieces(name: str) -> Iterator[Tensor]:
        owner, _, key = name.rpartition(".")
        target = targets.get(owner)
        if target is None or key == "bias":
            yield from _copied(conversion.source.checkpoint, name, shard.tensors[name].dtype)
        elif conversion.format is None:
            yield from (to_stored(name, rows) for rows in _float_rows(conversion.source.read_quantized(target.before)))
        else:
            if name not in packed:
                found = conversion.format.pack(_converted(conversion, target))
                packed.update({f"{owner}.{key}": tensor for key, tensor in found.items()})
            yield packed.pop(name)

    specs = {name: (spec.dtype, spec.shape) for name, spec in shard.tensors.items()}
    sha256 = write_pieces(conversion.out / shard.file, specs, pieces)
    written = open_file(conversion.out / shard.file)
    records = [_proved(conversion, target, written) for target in targets.values()]
    return_freed_memory()
    return Unit(shard.unit, shard.file, sha256, {"linears": records})


def _copied(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator[Tensor]:
    for piece in checkpoint.pieces(name):
        yield piece if dtype_name(piece.dtype) == dtype else to_stored(name, piece)


def _float_rows(quantized: QuantizedTensor) -> Iterator[Tensor]:
    """The weights in float32, a few rows at a time."""
    step = max(1, WEIGHTS_AT_ONCE // quantized.in_features)
    parts = zip(*(t.split(step) for t in (quantized.codes, quantized.scales, quantized.zeros)), strict=True)
    for codes, scales, zeros in parts:
        yield dequantize(replace(quantized, codes=codes, scales=scales, zeros=zeros))


def _converted(conversion: Conversion, target: Target) -> QuantizedTensor:
    """The linear as the output holds it."""
    fmt, scheme = conversion.format, target.linear.scheme
    assert fmt is not None
    assert scheme is not None
    quantized = _arranged(conversion.source.read_quantized(target.before), fmt, target)
    if target.obstacle is None:
        return quantized
    if target.scales_only:
        return replace(quantized, scales=to_float16(quantized.scales.float()))
    parts = [rtn.quantize(weight, scheme, min_zero=fmt.min_zero(scheme)) for weight in _float_rows(quantized)]
    codes, scales, zeros = (torch.cat([getattr(p, key) for p in parts]) for key in ("codes", "scales", "zeros"))
    return QuantizedTensor(codes, scales, zeros, scheme)


def _arranged(quantized: QuantizedTensor, fmt: Format, target: Target) -> QuantizedTensor:
    """The same numbers as the output has them: the true scheme, the scales' dtype, groups in order if they can be."""
    scheme = target.linear.scheme if target.obstacle is None or target.scales_only else quantized.scheme
    assert scheme is not None
    quantized = replace(quantized, scheme=scheme)
    if target.obstacle is None:
        quantized = replace(quantized, scales=quantized.scales.to(torch_dtype(target.scale_dtype)))
    if quantized.g_idx is None or "g_idx" in fmt.specs(*spec_arguments(target.linear)):
        return quantized
    order = blocks_of(quantized.g_idx, scheme, quantized.in_features)
    if order is None:
        return quantized
    return replace(quantized, scales=quantized.scales[:, order], zeros=quantized.zeros[:, order], g_idx=None)


def _proved(conversion: Conversion, target: Target, written: Checkpoint) -> dict[str, Any]:
    """Read a linear back from the file and compare it with the source: its record for the journal and the result."""
    linear, source = target.linear, conversion.source.read_quantized(target.before)
    fmt = conversion.format
    names = packed_names(fmt, linear) if fmt else [f"{linear.name}.weight"]
    nbytes = sum(written.entries[name].nbytes for name in names)

    def record(*, equal: bool, weight_error: float) -> dict[str, Any]:
        before = name_of(target.before.scheme)
        return linear.record(nbytes, before=before, equal=equal, weight_error=weight_error).content()

    if fmt is None or linear.scheme is None:
        weight = written.read(names[0])
        step = max(1, WEIGHTS_AT_ONCE // linear.in_features)
        return record(equal=False, weight_error=relative_distance(_float_rows(source), weight.split(step)))
    again = unpacked(written.read_many(names), linear, fmt)
    if target.obstacle is not None:
        return record(equal=False, weight_error=relative_distance(_float_rows(source), _float_rows(again)))
    if not _equal(_arranged(source, fmt, target), again):
        raise OutputError(
            f"{linear.name}: what is read back from {conversion.out} is not what was read; is a disk failing?"
        )
    return record(equal=True, weight_error=0.0)


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = [(a.codes, b.codes), (a.zeros, b.zeros), (a.scales, b.scales)]
    if a.g_idx is not None or b.g_idx is not None:
        if a.g_idx is None or b.g_idx is None:
            return False
        pairs.append((a.g_idx, b.g_idx))
    return a.scheme == b.scheme and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def relative_distance(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """The norm of the difference over the norm, of two weights in equal pieces."""
    apart = whole = 0.0
    for a, b in zip(before, after, strict=True):
        apart += float((a - b.float()).double().square().sum())
        whole += float(a.double().square().sum())
    return math.sqrt(apart / whole) if whole else 0.0
