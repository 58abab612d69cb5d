# SPDX-License-Identifier: Apache-2.0
"""The same integers in another format: from the files of a checkpoint to other files, one decoder layer at a time.

What a linear holds is known before any work from its scales, zero points and group index, a few percent of the file: so
whether the target can hold it is known, too (`obstacle`). What it can hold is unpacked, packed, written, read back from
the file and compared: codes, scales, zero points and group index must be equal. What it cannot is refused, or rounded
again on request, and then the difference of what is read back is measured.

Nothing is as large as a layer but its packed tensors: plain tensors are copied in pieces, and weights exist as floats
a few rows at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.checkpoint.journal import Unit
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, open_file, shorten
from quantkit.checkpoint.writer import shard_name, write_pieces
from quantkit.dtypes import dtype_name, stored_dtype, to_stored, torch_dtype
from quantkit.errors import ModelError, OutputError, QuantkitError, SchemeError
from quantkit.formats import Format, QuantizedLayer, TensorSpec
from quantkit.formats.awq import AWQ
from quantkit.formats.base import SCALES
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.reading import read_schemes, unpack, unpack_zeros
from quantkit.grids.base import to_float16
from quantkit.grids.registry import dequantize
from quantkit.hardware.machine import return_freed_memory
from quantkit.methods import rtn
from quantkit.model.config import config_from_dict
from quantkit.model.streaming import Architecture, build
from quantkit.plan import COPIED, OUTSIDE, STORED, LinearPlan, ShardPlan, described
from quantkit.quantized import (
    changes_nothing,
    packed_names,
    parameters,
    quantization_of,
    read_config,
    stored_linears,
)
from quantkit.scheme import MAX_BITS, MIN_BITS, QuantizedTensor, Scheme, name_of

WEIGHTS_AT_ONCE = 1 << 22  # as floats

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A quantized checkpoint that is there: config.json, tensors, and what its linears are (the head's layer is -1)."""

    raw: Mapping[str, Any]
    checkpoint: Checkpoint
    architecture: Architecture
    format: Format
    linears: tuple[LinearPlan, ...]
    left_out: tuple[str, ...]

    def read(self, linear: LinearPlan) -> QuantizedTensor:
        """A quantized linear as it is stored.

        Raises:
            ModelError, NumericsError: with its name, see the formats.
        """
        assert linear.scheme is not None
        names = packed_names(self.format, linear)
        packed = {name.removeprefix(f"{linear.name}."): self.checkpoint.read(name) for name in names}
        return _named(linear.name, unpack, self.format, packed, linear.scheme, _shape(linear))


@dataclass(frozen=True)
class Held:
    """What a quantized linear holds, known without its codes.

    scheme: as it is: symmetric also where zero points are stored and all lie in the middle (`central`)
    scattered: whether columns that are side by side are in different groups (act-order)
    scale_dtype: float16 where it holds every scale exactly, else as stored
    """

    scheme: Scheme
    smallest_zero: int
    central: bool
    scattered: bool
    scale_dtype: str


@dataclass(frozen=True)
class Target:
    """A linear of the output: its plan, the scheme that it had, and why it must be rounded again (None: it need not).

    scale_dtype: of the output's scales
    """

    linear: LinearPlan
    before: LinearPlan
    obstacle: str | None = None
    scale_dtype: str = STORED
    scales_only: bool = False


@dataclass(frozen=True)
class Conversion:
    """Everything that determines the output. format None: 16 bit, nothing is quantized."""

    source: Source
    format: Format | None
    targets: tuple[Target, ...]
    shards: tuple[ShardPlan, ...]
    quantization_config: dict[str, Any]
    out: Path

    @property
    def lossless(self) -> bool:
        """Whether every integer stays as it is."""
        return self.format is not None and all(target.obstacle is None for target in self.targets)


def _shape(linear: LinearPlan) -> tuple[int, int]:
    return (linear.out_features, linear.in_features)


def _named(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns; its errors with the name before them."""
    try:
        return function(*arguments)
    except QuantkitError as error:
        raise type(error)(f"{name}: {error}") from error


# ---------------------------------------------------------------- what is there


def open_source(directory: Path) -> Source:
    """Read config.json and the headers of a quantized checkpoint of any tool; the architecture comes from the config.

    Raises:
        ModelError: not quantized, a kind that is not supported, a damaged checkpoint, or tensors that have no place.
    """
    raw = read_config(directory)
    quantization = quantization_of(raw)
    if not quantization:
        raise ModelError(f"{directory}: config.json has no quantization_config; expected a quantized checkpoint")
    checkpoint = open_checkpoint(directory)
    architecture = build(config_from_dict({k: v for k, v in raw.items() if k != "compression_config"}), checkpoint)
    fmt, linears = stored_linears(architecture, checkpoint, quantization)
    if all(linear.scheme is None for linear in linears):
        raise ModelError(f"{directory}: every linear is stored in 16 bit; expected a quantized checkpoint")
    left_out = _without_place(architecture, checkpoint, fmt, linears)
    return Source(raw, checkpoint, architecture, fmt, linears, left_out)


def _without_place(
    architecture: Architecture, checkpoint: Checkpoint, fmt: Format, linears: tuple[LinearPlan, ...]
) -> tuple[str, ...]:
    """The stored tensors that change nothing, and are not copied.

    Raises:
        ModelError: tensors are missing, of another shape, or have no place in the architecture and may change it.
    """
    where, entries = checkpoint.directory, checkpoint.entries
    packed = {f"{x.name}.weight": packed_names(fmt, x) for x in linears if x.scheme is not None}
    plain = {name: shape for name, shape in parameters(architecture).items() if name not in packed}
    needed = {*plain, *(name for names in packed.values() for name in names)}
    if missing := sorted(needed - set(entries)):
        raise ModelError(f"{where}: {len(missing)} tensors missing ({shorten(missing)})")
    for name, shape in plain.items():
        if entries[name].shape != shape:
            raise ModelError(f"{where}: {name}: expected {list(shape)} by config.json, got {list(entries[name].shape)}")
    extra = tuple(sorted(entries.keys() - needed - architecture.copied.keys()))
    if unknown := [name for name in extra if not changes_nothing(architecture, checkpoint, linears, name)]:
        raise ModelError(f"{where}: {len(unknown)} tensors have no place in the architecture ({shorten(unknown)})")
    return extra


def survey(source: Source) -> dict[str, Held]:
    """Full name -> what a quantized linear holds, from everything but the codes.

    Raises:
        ModelError: tensors that the config does not describe.
    """
    found = {x.name: _held(source, x, x.scheme) for x in source.linears if x.scheme is not None}
    # One linear alone may have such zero points by chance, and needs them where others of its scheme do.
    stored = {held.scheme for held in found.values() if not held.central}
    return {
        name: held if held.scheme in stored else replace(held, scheme=replace(held.scheme, symmetric=True))
        for name, held in found.items()
    }


def _held(source: Source, linear: LinearPlan, scheme: Scheme) -> Held:
    read = source.checkpoint.read
    small = {
        key: read(name)
        for name in packed_names(source.format, linear)
        if (key := name.removeprefix(f"{linear.name}.")) != source.format.codes
    }
    zeros = _named(linear.name, unpack_zeros, source.format, small, scheme, _shape(linear))
    scales = source.format.scales(small)
    assert scales is not None
    exact = torch.equal(scales.to(torch.float16).float(), scales.float())
    scattered = "g_idx" in small and _blocks(small["g_idx"], scheme, linear.in_features) is None
    central = bool((zeros == scheme.middle).all())
    return Held(scheme, int(zeros.min()), central, scattered, STORED if exact else dtype_name(scales.dtype))


def _blocks(g_idx: Tensor, scheme: Scheme, in_features: int) -> Tensor | None:
    """The group of each block of consecutive columns [groups], if each block is one group of its own; else None."""
    grouped = g_idx.view(scheme.groups(in_features), -1)
    order = grouped[:, 0]
    whole = bool((grouped == order.unsqueeze(1)).all())
    return order.long() if whole and len(set(order.tolist())) == len(order) else None


# ---------------------------------------------------------------- what the target can hold


def obstacle(fmt: Format, held: Held, shape: tuple[int, int]) -> str | None:
    """None if the format holds the linear as it is, else why not, in one line."""
    if reason := fmt.why_not(held.scheme, *shape):
        return reason
    if held.scattered and "g_idx" not in fmt.specs(held.scheme, *shape):
        return "act-order (g_idx): groups of columns that are not side by side, which gptq and gptq_v2 hold"
    if held.smallest_zero < fmt.min_zero(held.scheme):
        return f"a zero point of {held.smallest_zero}, which {fmt.name} does not hold safely; gptq_v2 holds it"
    return _scale_obstacle(fmt, held)


def _scale_obstacle(fmt: Format, held: Held) -> str | None:
    if held.scale_dtype == STORED or fmt is COMPRESSED_TENSORS:
        return None
    name = held.scale_dtype
    return f"scales in {name} that float16 does not hold exactly; compressed-tensors holds them"


def nearest(fmt: Format, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
    """The scheme that the format holds with the fewest losses: as many bits or more before fewer, smaller groups."""
    bits = sorted(range(MIN_BITS, MAX_BITS + 1), key=lambda b: (b < scheme.bits, abs(b - scheme.bits)))
    groups = [scheme.group_size, *(g for g in (128, 64, 32) if g < scheme.columns_per_group(shape[1]))]
    options = (Scheme(b, g, scheme.symmetric) for b in bits for g in groups)
    return next((option for option in options if fmt.why_not(option, *shape) is None), None)


def choose_targets(source: Source, fmt: Format | None, *, requantize: bool) -> tuple[Target, ...]:
    """What each linear becomes.

    Raises:
        SchemeError: the format cannot hold one as it is and requantize is False, or cannot hold it at all.
    """
    held = survey(source)
    if fmt is None:
        return tuple(Target(replace(linear, scheme=None), linear) for linear in source.linears)
    targets = [_target(fmt, x, held[x.name]) if x.scheme else Target(x, x) for x in source.linears]
    if not fmt.holds_mixed:
        targets = _one_scheme(fmt, targets)
    refused = [target for target in targets if target.obstacle is not None]
    if refused and not requantize:
        others = f" (and {len(refused) - 1} other linears)" if len(refused) > 1 else ""
        raise SchemeError(
            f"{refused[0].linear.name}{others}: {refused[0].obstacle}; "
            "--requantize rounds what does not fit again, and measures the loss"
        )
    return tuple(targets)


def _target(fmt: Format, linear: LinearPlan, held: Held) -> Target:
    shape, before = _shape(linear), linear
    reason = obstacle(fmt, held, shape)
    if reason is None:
        return Target(replace(linear, scheme=held.scheme), before, None, held.scale_dtype)
    if reason == _scale_obstacle(fmt, held):
        return Target(replace(linear, scheme=held.scheme), before, reason, scales_only=True)
    scheme = nearest(fmt, held.scheme, shape)
    if scheme is None:
        raise SchemeError(f"{linear.name}: {reason}")
    return Target(replace(linear, scheme=scheme), before, reason)


def _one_scheme(fmt: Format, targets: list[Target]) -> list[Target]:
    """All with the scheme that most weights have already."""
    counts: Counter[Scheme] = Counter()
    for target in targets:
        if target.linear.scheme is not None:
            counts[target.linear.scheme] += math.prod(_shape(target.linear))
    ((base, _),) = counts.most_common(1)

    def alike(target: Target) -> Target:
        if target.linear.scheme in (None, base):
            return target
        if reason := fmt.why_not(base, *_shape(target.linear)):
            raise SchemeError(f"{target.linear.name}: {reason}")
        reason = target.obstacle or f"{fmt.name} holds one scheme, {base} here, and this is {target.linear.scheme}"
        return replace(
            target, linear=replace(target.linear, scheme=base), obstacle=reason, scales_only=False, scale_dtype=STORED
        )

    return [alike(target) for target in targets]


def make_conversion(source: Source, fmt: Format | None, out: Path, *, requantize: bool) -> Conversion:
    """Plan the output: every tensor's name, dtype and shape, and what config.json will say.

    Raises:
        SchemeError: see `choose_targets` and the format's config.
    """
    targets = choose_targets(source, fmt, requantize=requantize)
    shards = _shards(source, fmt, targets)
    if fmt is None:
        return Conversion(source, None, targets, shards, {}, out)
    quantized = [QuantizedLayer(t.linear.name, t.linear.scheme) for t in targets if t.linear.scheme is not None]
    kept = [t.linear.name for t in targets if t.linear.scheme is None and t.linear.layer != OUTSIDE]
    head = source.architecture.head_name
    if head and head not in {layer.name for layer in quantized}:
        kept.append(head)
    config = described(source.architecture, fmt, quantized, kept, **_config_options(source, fmt, targets))
    _require_same_meaning(fmt, targets, config, shards)
    return Conversion(source, fmt, targets, shards, config, out)


def _config_options(source: Source, fmt: Format, targets: tuple[Target, ...]) -> dict[str, Any]:
    """How GPTQ was run, where the source says so, and whether an index that is not in order is written."""
    said = quantization_of(source.raw)
    quantized = [t for t in targets if t.linear.scheme is not None]
    holds = "g_idx" in fmt.specs(*_spec_arguments(quantized[0].linear))
    damp = said.get("damp_percent")
    options: dict[str, Any] = {"desc_act": holds and any(_keeps_order(source, t) for t in quantized)}
    if isinstance(damp, float):
        options["damp_percent"] = damp
    return options | {"static_groups": bool(said.get("static_groups"))}


def _keeps_order(source: Source, target: Target) -> bool:
    name = f"{target.before.name}.g_idx"
    if target.obstacle is not None or name not in source.checkpoint.entries:
        return False
    g_idx = source.checkpoint.read(name)
    return not bool((g_idx.diff() >= 0).all())


def _spec_arguments(linear: LinearPlan) -> tuple[Scheme, int, int]:
    assert linear.scheme is not None
    return (linear.scheme, *_shape(linear))


def _require_same_meaning(
    fmt: Format, targets: tuple[Target, ...], config: dict[str, Any], shards: tuple[ShardPlan, ...]
) -> None:
    """The config must say of every linear what was meant."""
    stored = {name: spec for shard in shards for name, spec in shard.tensors.items()}
    linears = {target.linear.name: target.linear for target in targets}
    _, schemes = read_schemes(config, {name: _shape(linear) for name, linear in linears.items()}, stored)
    for name, linear in linears.items():
        meant, said = linear.scheme, schemes[name]
        if fmt is AWQ and meant and said:  # its files always hold zero points, and say so
            meant = replace(meant, symmetric=said.symmetric)
        if meant != said:
            raise OutputError(f"{name}: {meant or '16 bit'} is meant, config.json would say {said or '16 bit'}")


def _shards(source: Source, fmt: Format | None, targets: tuple[Target, ...]) -> tuple[ShardPlan, ...]:
    """One file for the embeddings, one for each decoder layer, one for what follows: the files of a run."""
    architecture = source.architecture
    by_name = {target.linear.name: target for target in targets}
    contents: list[tuple[str, list[str]]] = [("embeddings", list(architecture.before_layers()))]
    for index in range(len(architecture.layers)):
        prefix = architecture.layer_name(index)
        contents.append((f"layer.{index}", [f"{prefix}.{name}" for name in architecture.layer_shapes(index)]))
    if after := list(architecture.after_layers()):
        contents.append(("head", after))
    if architecture.copied:
        contents.append((COPIED, list(architecture.copied)))
    shapes = parameters(architecture)

    def specs(name: str) -> dict[str, TensorSpec]:
        if name in architecture.copied:
            return {name: TensorSpec(*architecture.copied[name])}
        owner, _, key = name.rpartition(".")
        target = by_name.get(owner)
        if fmt is None:
            return {name: TensorSpec(stored_dtype(name), shapes[name])}
        if key != "weight" or target is None or target.linear.scheme is None:
            return {name: TensorSpec(source.checkpoint.entries[name].dtype, shapes[name])}
        return {
            f"{owner}.{key}": replace(spec, dtype=target.scale_dtype) if spec.dtype == SCALES else spec
            for key, spec in fmt.specs(*_spec_arguments(target.linear)).items()
        }

    return tuple(
        ShardPlan(unit, shard_name(number, len(contents)), {n: s for name in names for n, s in specs(name).items()})
        for number, (unit, names) in enumerate(contents, start=1)
    )


# ---------------------------------------------------------------- one file after the other


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
            yield from (to_stored(name, rows) for rows in _float_rows(conversion.source.read(target.before)))
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
    quantized = _arranged(conversion.source.read(target.before), fmt, target)
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
    if quantized.g_idx is None or "g_idx" in fmt.specs(*_spec_arguments(target.linear)):
        return quantized
    order = _blocks(quantized.g_idx, scheme, quantized.in_features)
    if order is None:
        return quantized
    return replace(quantized, scales=quantized.scales[:, order], zeros=quantized.zeros[:, order], g_idx=None)


def _proved(conversion: Conversion, target: Target, written: Checkpoint) -> dict[str, Any]:
    """Read a linear back from the file and compare it with the source: its record for the journal and the result."""
    linear, source = target.linear, conversion.source.read(target.before)
    fmt = conversion.format
    names = packed_names(fmt, linear) if fmt else [f"{linear.name}.weight"]
    nbytes = sum(written.entries[name].nbytes for name in names)

    def record(*, equal: bool, weight_error: float) -> dict[str, Any]:
        before = name_of(target.before.scheme)
        return linear.record(nbytes, before=before, equal=equal, weight_error=weight_error).content()

    if fmt is None or linear.scheme is None:
        weight = written.read(names[0])
        step = max(1, WEIGHTS_AT_ONCE // linear.in_features)
        return record(equal=False, weight_error=_distance(_float_rows(source), weight.split(step)))
    packed = {name.removeprefix(f"{linear.name}."): written.read(name) for name in names}
    again = _named(linear.name, unpack, fmt, packed, linear.scheme, _shape(linear))
    if target.obstacle is not None:
        return record(equal=False, weight_error=_distance(_float_rows(source), _float_rows(again)))
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


def _distance(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """The norm of the difference over the norm, of two weights in equal pieces."""
    apart = whole = 0.0
    for a, b in zip(before, after, strict=True):
        apart += float((a - b.float()).double().square().sum())
        whole += float(a.double().square().sum())
    return math.sqrt(apart / whole) if whole else 0.0
