# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any tool: from config.json's `quantization_config` and what is stored to a format and its schemes.

AutoAWQ, AutoGPTQ, GPTQModel and llm-compressor write the tensors that our formats read, and differ in what they say
about them. Where a config leaves a question open the files answer it: a linear that is stored as it was is in 16 bit.
Where the two contradict each other the checkpoint is refused, because engines would disagree on what it means.
Each format's `reads` says what its configs mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.dtypes import dtype_name
from quantkit.errors import ModelError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import SCALES, Format, TensorSpec
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]  # out_features, in_features


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
    for fmt in FORMATS.values():
        resolve = fmt.reads(quantization_config) if method and fmt.quant_method == method else None
        if resolve is not None:
            schemes = {name: resolve(name) for name in linears}
            fmt = _as_stored(fmt, quantization_config, linears, stored)
            return fmt, {name: _held_against(stored, name, linears[name], schemes[name], fmt) for name in linears}
    raise ModelError(f"quant_method: expected {', '.join(quant_methods())}, got {method!r:.80}")


def quant_methods() -> list[str]:
    """Every `quant_method` that is read."""
    return list(dict.fromkeys(fmt.quant_method for fmt in FORMATS.values() if fmt.quant_method))


def codes_keys() -> list[str]:
    """The keys under which formats store codes."""
    return list(dict.fromkeys(fmt.codes for fmt in FORMATS.values()))


def unpack(fmt: Format, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> QuantizedTensor:
    """As `fmt.unpack`, for files of every tool.

    Scales that are not float16 stay as they are (bfloat16 reaches where float16 does not), and older layouts are read.

    Raises:
        ModelError, NumericsError, SchemeError: see the formats.
    """
    quantized = fmt.unpack(fmt.older(tensors, scheme, shape), scheme, shape)
    scales = fmt.scales(tensors)
    return quantized if scales is None or dtype_name(scales.dtype) == SCALES else replace(quantized, scales=scales)


def unpack_zeros(fmt: Format, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Tensor:
    """The zero points (uint8 [out, groups]) of files of every tool, without the codes; symmetric ones are checked.

    Raises:
        ModelError: see the formats.
    """
    return fmt.unpack_zeros(fmt.older(tensors, scheme, shape), scheme, shape)


# ---------------------------------------------------------------- what the files say


def _as_stored(
    fmt: Format, config: Mapping[str, Any], linears: Iterable[str], stored: Mapping[str, Described]
) -> Format:
    """The format without the optional tensors that no linear has."""
    names = list(linears)
    lacking = {key for key in fmt.optional if not any(f"{name}.{key}" in stored for name in names)}
    if "g_idx" in lacking and config.get("desc_act") and not config.get("static_groups"):
        raise ModelError("desc_act is true, but no g_idx is stored to tell the order of the columns; get whole files")

    def specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        whole = fmt.specs(scheme, out_features, in_features)
        return {key: spec for key, spec in whole.items() if key not in lacking}

    return replace(fmt, specs=specs) if lacking else fmt


def _held_against(
    stored: Mapping[str, Described], name: str, shape: Shape, said: Scheme | None, fmt: Format
) -> Scheme | None:
    """The scheme of one linear, agreed on by config and files."""
    packed = [key for key in codes_keys() if f"{name}.{key}" in stored]
    plain = f"{name}.weight" in stored
    if bool(packed) == plain:
        found = f"both weight and {packed[0]}" if packed else f"neither weight nor {' nor '.join(codes_keys())}"
        raise ModelError(f"{name}: {found} stored; expected one of them; the checkpoint is damaged")
    if plain:
        if said is not None and fmt.says_all:
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
        if tuple(tensor.shape) not in (spec.shape, fmt.older_shape(key, scheme, shape, spec.shape)):
            raise ModelError(
                f"{name}: {key}: expected {list(spec.shape)} for {scheme} of {shape[0]} x {shape[1]}, "
                f"got {list(tensor.shape)}; does config.json belong to these files?"
            )
