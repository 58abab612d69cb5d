# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any tool: from config.json's `quantization_config` and what is stored to a format and its schemes.

AutoAWQ, AutoGPTQ, GPTQModel and llm-compressor write the tensors that our formats read, and differ in what they say
about them. Where a config leaves a question open the files answer it: a linear that is stored as it was is in 16 bit.
Where the two contradict each other the checkpoint is refused, because engines would disagree on what it means.

    awq                 bits, group_size, zero_point, version; the lists of 16-bit layers are matched by substring in
                        some readers and by name in others, so only an exact name counts
    gptq                bits, group_size, sym; checkpoint_format (or format) tells v1 from v2, none is v1; `dynamic` is
                        an ordered table of regular expressions, "-:" in 16 bit, the first that matches counts
    compressed-tensors  config_groups with targets: names before "re:" patterns before class names; ignore
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.dtypes import dtype_name
from quantkit.errors import ModelError, SchemeError
from quantkit.formats import awq, compressed_tensors, gptq
from quantkit.formats.awq import AWQ
from quantkit.formats.base import SCALES, Format
from quantkit.formats.bits import WORD_BITS, pack_bits, unpack_bits, words_for
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS, LAYOUT
from quantkit.formats.gptq import GPTQ, GPTQ_V2
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]  # out_features, in_features
Resolve = Callable[[str], Scheme | None]
CODES = ("qweight", "weight_packed")
AWQ_VERSIONS = ("gemm", "exllama", "ipex")  # the last two name a kernel; the tensors are those of gemm


class Described(Protocol):
    """A stored tensor, known by its header."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def read_schemes(
    quantization_config: Mapping[str, Any], linears: Mapping[str, Shape], stored: Mapping[str, Described]
) -> tuple[Format, dict[str, Scheme | None]]:
    """The format of a checkpoint and the scheme of each of its linears; None where a linear is stored in 16 bit.

    linears: full name -> (out_features, in_features); stored: every tensor of the files by its full name

    Raises:
        ModelError: a method, layout or scheme that is not supported; a config that the files contradict.
    """
    method = quantization_config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ModelError(f"quant_method: expected {', '.join(READERS)}, got {method!r:.80}")
    fmt, resolve = READERS[method](quantization_config)
    return fmt, {name: _held_against(stored, name, shape, resolve(name), fmt) for name, shape in linears.items()}


def unpack(fmt: Format, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> QuantizedTensor:
    """As `fmt.unpack`, for files of every tool.

    Scales that are not float16 stay as they are (bfloat16 reaches where float16 does not), and words of
    compressed-tensors that were filled up with zero bits are closed up first.

    Raises:
        ModelError, NumericsError, SchemeError: see the formats.
    """
    if fmt is COMPRESSED_TENSORS:
        tensors = {key: _closed_up(key, tensor, scheme, shape) for key, tensor in tensors.items()}
        scales = tensors.get("weight_scale")
    else:
        scales = tensors["scales"].t().contiguous() if "scales" in tensors else None
    quantized = fmt.unpack(tensors, scheme, shape)
    return quantized if scales is None or dtype_name(scales.dtype) == SCALES else replace(quantized, scales=scales)


def unpack_zeros(fmt: Format, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Tensor:
    """The zero points (uint8 [out, groups]) of files of every tool, without the codes; symmetric ones are checked.

    Raises:
        ModelError: see the formats.
    """
    return _ZEROS[fmt.name](
        {key: _closed_up(key, tensor, scheme, shape) for key, tensor in tensors.items()}, scheme, shape
    )


_ZEROS: dict[str, Callable[[Mapping[str, Tensor], Scheme, Shape], Tensor]] = {
    AWQ.name: awq.unpack_zeros,
    GPTQ.name: partial(gptq.unpack_zeros, v1=True),
    GPTQ_V2.name: partial(gptq.unpack_zeros, v1=False),
    COMPRESSED_TENSORS.name: compressed_tensors.unpack_zeros,
}


# ---------------------------------------------------------------- what the files say


def _held_against(
    stored: Mapping[str, Described], name: str, shape: Shape, said: Scheme | None, fmt: Format
) -> Scheme | None:
    """The scheme of one linear, agreed on by config and files."""
    packed = [key for key in CODES if f"{name}.{key}" in stored]
    plain = f"{name}.weight" in stored
    if bool(packed) == plain:
        found = f"both weight and {packed[0]}" if packed else f"neither weight nor {' nor '.join(CODES)}"
        raise ModelError(f"{name}: {found} stored; expected one of them; the checkpoint is damaged")
    if plain:
        if said is not None and fmt is COMPRESSED_TENSORS:  # the others leave the question to the files
            raise ModelError(f"{name}: {said} by the quantization_config, but stored in 16 bit; it should be in ignore")
        return None
    if said is None:
        raise ModelError(f"{name}: 16 bit by the quantization_config, but {packed[0]} is stored; readers differ on it")
    if f"{name}.weight_g_idx" in stored:
        raise ModelError(f"{name}: weight_g_idx: act-order groups are not read from compressed-tensors, nor by engines")
    _check_shapes(stored, name, shape, said, fmt)
    return said


def _check_shapes(stored: Mapping[str, Described], name: str, shape: Shape, scheme: Scheme, fmt: Format) -> None:
    try:
        specs = fmt.specs(scheme, *shape)
    except SchemeError as error:
        raise ModelError(f"{name}: {error}") from error
    for key, spec in specs.items():
        tensor = stored.get(f"{name}.{key}")
        if tensor is None:
            raise ModelError(f"{name}: {key} is missing; expected for {scheme} in {fmt.name}")
        padded = _padded_shape(key, scheme, shape, spec.shape) if fmt is COMPRESSED_TENSORS else spec.shape
        if tuple(tensor.shape) not in (spec.shape, padded):
            raise ModelError(
                f"{name}: {key}: expected {list(spec.shape)} for {scheme} of {shape[0]} x {shape[1]}, "
                f"got {list(tensor.shape)}; does config.json belong to these files?"
            )


# ---------------------------------------------------------------- compressed-tensors before 0.20: padded words


def _padded_words(count: int, bits: int) -> int:
    return math.ceil(count / (WORD_BITS // bits))


def _padded_shape(key: str, scheme: Scheme, shape: Shape, dense: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of words that hold whole codes only; other tensors are as they are."""
    out_features, in_features = shape
    if key == "weight_packed":
        return (dense[0], _padded_words(in_features, scheme.bits))
    if key == "weight_zero_point":
        return (_padded_words(out_features, scheme.bits), dense[1])
    return dense


def _closed_up(key: str, words: Tensor, scheme: Scheme, shape: Shape) -> Tensor:
    if key == "weight_packed":
        return _dense(words, scheme.bits, shape[1])
    if key == "weight_zero_point":
        return _dense(words.t(), scheme.bits, shape[0]).t().contiguous()
    return words


def _dense(words: Tensor, bits: int, count: int) -> Tensor:
    """Words [rows, w] of whole codes -> the dense stream [rows, ceil(count * bits / 32)]; a dense one is returned."""
    rows, width = words.shape
    if width == words_for(count, bits) or width != _padded_words(count, bits):
        return words
    codes = unpack_bits(words.reshape(rows * width, 1), bits, WORD_BITS // bits)
    return pack_bits(codes.view(rows, -1)[:, :count].contiguous(), bits)


# ---------------------------------------------------------------- what the configs say


def _awq(config: Mapping[str, Any]) -> tuple[Format, Resolve]:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version not in AWQ_VERSIONS:
        raise ModelError(f"awq version {version!r:.40}: expected gemm; the layout of others is not read")
    if config.get("backend") == "llm-awq":
        raise ModelError("awq of llm-awq: its layout is not read; expected that of AutoAWQ")
    base = _scheme(config, symmetric=config.get("zero_point") is False)
    kept = _strings(config, "modules_to_not_convert")
    listed = _dynamic(config, lambda changes: base)

    def resolve(name: str) -> Scheme | None:
        return None if name in kept else listed(name, base)

    return AWQ, resolve


def _gptq(config: Mapping[str, Any]) -> tuple[Format, Resolve]:
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    formats = {fmt.name: fmt for fmt in (GPTQ, GPTQ_V2)}
    if config.get("is_marlin_format") or version not in formats:
        found = "marlin" if config.get("is_marlin_format") else version
        raise ModelError(f"gptq checkpoint_format {found!r:.40}: expected gptq or gptq_v2; repacked files are not read")

    def scheme(changes: Mapping[str, Any]) -> Scheme:
        merged = {**config, **changes}
        return _scheme(merged, symmetric=bool(merged.get("sym", True)))

    base, listed = scheme({}), _dynamic(config, scheme)
    return formats[version], lambda name: listed(name, base)


def _dynamic(
    config: Mapping[str, Any], scheme: Callable[[Mapping[str, Any]], Scheme]
) -> Callable[[str, Scheme], Scheme | None]:
    """GPTQModel's `dynamic`: (name, scheme of the others) -> the scheme, or None for 16 bit."""
    rules: list[tuple[re.Pattern[str], Scheme | None]] = []
    for text, changes in _object(config, "dynamic").items():
        skips = text.startswith("-:")
        changed = None if skips else scheme(changes if isinstance(changes, Mapping) else {})
        rules.append((_pattern(text[2:] if text[:2] in ("-:", "+:") else text), changed))

    def resolve(name: str, base: Scheme) -> Scheme | None:
        return next((found for pattern, found in rules if pattern.match(name)), base)

    return resolve


def _compressed(config: Mapping[str, Any]) -> tuple[Format, Resolve]:
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise ModelError(f"compressed-tensors {key}: not supported; only quantized weights are read")
    if _object(config, "sparsity_config").get("format", "dense") != "dense":
        raise ModelError("compressed-tensors sparsity_config: sparse weights are not read")
    targets: dict[str, Mapping[str, Any]] = {}
    for label, group in _object(config, "config_groups").items():
        if not isinstance(group, Mapping):
            raise ModelError(f"config_groups.{label}: expected an object, got {group!r:.40}")
        complete = {"format": config.get("format")} | {key: value for key, value in group.items() if value is not None}
        targets |= dict.fromkeys(_strings(group, "targets"), complete)
    ignored = _strings(config, "ignore")
    # As its `match_targets`: exact names, then patterns, each in order; a class name is the least specific.
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    ordered = [*(t for t in ordered if t not in _CLASSES), *(t for t in ordered if t in _CLASSES)]

    def resolve(name: str) -> Scheme | None:
        if any(_matches(target, name) for target in ignored):
            return None
        target = next((target for target in ordered if _matches(target, name)), None)
        return None if target is None else _group_scheme(name, targets[target])

    return COMPRESSED_TENSORS, resolve


_CLASSES = ("Linear", "Module")  # the classes that an nn.Linear is of


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return _pattern(target.removeprefix("re:")).match(name) is not None
    return target == name or target in _CLASSES


def _group_scheme(name: str, group: Mapping[str, Any]) -> Scheme | None:
    weights = _object(group, "weights")
    if not weights:
        return None
    refused = {
        "format": (group.get("format"), (LAYOUT,)),
        "weights.type": (weights.get("type", "int"), ("int",)),
        "weights.dynamic": (weights.get("dynamic") or False, (False,)),
        "weights.actorder": (weights.get("actorder") or None, (None, "weight", "static")),
        "input_activations": (group.get("input_activations"), (None,)),
        "output_activations": (group.get("output_activations"), (None,)),
    }
    for key, (found, expected) in refused.items():
        if found not in expected:
            raise ModelError(f"{name}: {key} {found!r:.60}: not supported; expected {expected[0]!r}")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if strategy not in ("group", "channel"):
        raise ModelError(f"{name}: weights.strategy {strategy!r:.40}: not supported; expected group or channel")
    size = -1 if strategy == "channel" else group_size
    fields = {"bits": weights.get("num_bits", 8), "group_size": size}
    return _scheme(fields, symmetric=bool(weights.get("symmetric", True)))


READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Format, Resolve]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}


def _scheme(config: Mapping[str, Any], *, symmetric: bool) -> Scheme:
    """Bits and group size under the names that the tools use."""
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    group_size = -1 if group_size is None else group_size
    for key, value in (("bits", bits), ("group_size", group_size)):
        if type(value) is not int:
            raise ModelError(f"quantization_config: {key}: expected a whole number, got {value!r:.40}")
    try:
        return Scheme(bits, group_size, symmetric)
    except SchemeError as error:
        raise ModelError(f"quantization_config: {error}") from error


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"quantization_config: {key}: expected an object, got {value!r:.40}")
    return value


def _strings(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"quantization_config: {key}: expected a list of names, got {value!r:.40}")
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ModelError(f"quantization_config: {text!r:.60}: not a regular expression ({error})") from error
