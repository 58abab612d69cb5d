# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors "pack-quantized" (https://github.com/vllm-project/compressed-tensors), 2 to 8 bits.

    weight_packed      int32   [out, ceil(in * bits / 32)]       one little-endian bit stream along each row
    weight_scale       float16 [out, groups]
    weight_shape       int64   [2]                               out, in
    weight_zero_point  int32   [ceil(out * bits / 32), groups]   down each column; asymmetric schemes only

The library thinks in signed values and stores value + 2**(bits - 1): the stored codes and zero points are ours as they
are. At 3, 5, 6 and 7 bits the stream is dense from 0.20 of the library on; older ones left the bits of a word unused
that hold no whole code, and cannot read this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError, SchemeError
from quantkit.formats.base import (
    Format,
    TensorSpec,
    matching,
    no_extra_files,
    refuse_g_idx,
    require,
    why_not_groups,
)
from quantkit.formats.bits import pack_bits, unpack_bits, words_for
from quantkit.formats.names import QuantizedLayer, check_layers, is_lm_head, pattern, with_fused
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = "pack-quantized"


def why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    return why_not_groups(scheme, in_features)


def specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    groups = scheme.groups(in_features)
    result = {
        "weight_packed": TensorSpec("int32", (out_features, words_for(in_features, scheme.bits))),
        "weight_scale": TensorSpec("float16", (out_features, groups)),
        "weight_shape": TensorSpec("int64", (2,)),
    }
    if not scheme.symmetric:
        result["weight_zero_point"] = TensorSpec("int32", (words_for(out_features, scheme.bits), groups))
    return result


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    import torch  # here and not above: see `dtypes`

    scheme = quantized.scheme
    require(why_not(scheme, quantized.out_features, quantized.in_features))
    refuse_g_idx("compressed-tensors", quantized)
    result = {
        "weight_packed": pack_bits(quantized.codes, scheme.bits),
        "weight_scale": quantized.scales.contiguous(),
        "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64, device=quantized.codes.device),
    }
    if not scheme.symmetric:
        result["weight_zero_point"] = pack_bits(quantized.zeros.t(), scheme.bits).t().contiguous()
    return result


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    if "weight_g_idx" in tensors:
        raise SchemeError("weight_g_idx: act-order groups are not read from compressed-tensors; gptq holds them")
    in_features = shape[1]
    packed, scales, stored_shape, *_ = matching(tensors, specs(scheme, *shape))
    if tuple(stored_shape.tolist()) != tuple(shape):
        raise ModelError(f"weight_shape: expected {list(shape)}, got {stored_shape.tolist()}; the file is damaged")
    zeros = unpack_zeros(tensors, scheme, shape)
    return QuantizedTensor(unpack_bits(packed, scheme.bits, in_features), scales, zeros, scheme)


def unpack_zeros(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """uint8 [out, groups], from weight_zero_point alone; a symmetric scheme stores none."""
    out_features, in_features = shape
    if scheme.symmetric:
        import torch

        device = next((tensor.device for tensor in tensors.values()), None)
        return torch.full((out_features, scheme.groups(in_features)), scheme.middle, dtype=torch.uint8, device=device)
    (packed,) = matching(tensors, {"weight_zero_point": specs(scheme, *shape)["weight_zero_point"]})
    return unpack_bits(packed.t(), scheme.bits, out_features).t().contiguous()


def config(
    quantized: Sequence[QuantizedLayer],
    kept: Sequence[str],
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
    static_groups: bool = False,
) -> dict[str, Any]:
    """One config group a scheme. A single scheme targets every Linear; several target disjoint lists of names.

    A head is always named: to vLLM it is no Linear.
    """
    check_layers(quantized, kept)
    if desc_act:
        raise SchemeError("compressed-tensors has no act-order; gptq holds it")
    schemes = list(dict.fromkeys(scheme for _, scheme in quantized))
    groups = {}
    for index, scheme in enumerate(schemes):
        names = [name for name, other in quantized if other == scheme]
        heads = [f"re:{pattern([name])}" for name in names if is_lm_head(name)]
        targets = ["Linear", *heads] if len(schemes) == 1 else [f"re:{pattern(with_fused(names))}"]
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size == -1 else "group",
                "group_size": None if scheme.group_size == -1 else scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": LAYOUT,
        }
    # A tied head is in no list, yet it is a Linear to the readers.
    head_is_named = any(map(is_lm_head, [*kept, *(name for name, _ in quantized)]))
    return {
        "quant_method": "compressed-tensors",
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*kept] if head_is_named else ["lm_head", *kept],
    }


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    holds_mixed=True,
    specs=specs,
    why_not=why_not,
    min_zero=lambda scheme: 0,
    pack=pack,
    unpack=unpack,
    config=config,
    extra_files=no_extra_files,
)
