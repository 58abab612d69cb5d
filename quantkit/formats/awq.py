# SPDX-License-Identifier: Apache-2.0
"""AWQ "gemm": the layout of AutoAWQ (https://github.com/casper-hansen/AutoAWQ), 4 bits only.

    qweight  int32   [in, out / 8]       nibble i of a word is output column [0, 2, 4, 6, 1, 3, 5, 7][i]
    qzeros   int32   [groups, out / 8]   the same order; the zero point as it is
    scales   float16 [groups, out]

One scheme for the whole checkpoint. Linears that stay in 16 bit are listed by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError, SchemeError
from quantkit.formats.base import (
    Format,
    TensorSpec,
    check_symmetric,
    matching,
    no_extra_files,
    refuse_g_idx,
    require,
    why_not_grid,
    why_not_groups,
)
from quantkit.formats.bits import pack_bits, unpack_bits
from quantkit.formats.fields import Resolve, dynamic, read_scheme, strings
from quantkit.formats.names import Fused, QuantizedLayer, check_layers, is_lm_head, pattern, with_fused
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = 8
VERSIONS = ("gemm", "exllama", "ipex")  # the last two name a kernel; the tensors are those of gemm


def why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    if scheme.grid != "integer":
        return why_not_grid("awq", scheme)
    if scheme.bits != BITS:
        return f"awq holds {BITS} bits only, got {scheme.bits}; compressed-tensors holds 2 to 8, gptq 2, 3, 4 and 8"
    if out_features % PER_WORD:
        return f"awq needs out_features divisible by {PER_WORD}, got {out_features}; compressed-tensors holds any"
    return why_not_groups(scheme, in_features)


def specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    require(why_not(scheme, out_features, in_features))
    groups = scheme.groups(in_features)
    return {
        "qweight": TensorSpec("int32", (in_features, out_features // PER_WORD)),
        "qzeros": TensorSpec("int32", (groups, out_features // PER_WORD)),
        "scales": TensorSpec("float16", (groups, out_features)),
    }


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    require(why_not(quantized.scheme, quantized.out_features, quantized.in_features))
    refuse_g_idx("awq", quantized)
    return {
        "qweight": _pack_columns(quantized.codes),
        "qzeros": _pack_columns(quantized.zeros),
        "scales": quantized.scales.t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    qweight, _, scales = matching(tensors, specs(scheme, *shape))
    zeros = unpack_zeros(tensors, scheme, shape)
    return QuantizedTensor(_unpack_columns(qweight), scales.t().contiguous(), zeros, scheme)


def unpack_zeros(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """uint8 [out, groups], from qzeros alone."""
    (qzeros,) = matching(tensors, {"qzeros": specs(scheme, *shape)["qzeros"]})
    zeros = _unpack_columns(qzeros)
    check_symmetric(zeros, scheme)
    return zeros


def _pack_columns(codes: Tensor) -> Tensor:
    """[out, columns] -> words [columns, out / 8]. The order 0 2 4 6 1 3 5 7 is a transposed 4 x 2 block."""
    rows, columns = codes.shape
    interleaved = codes.view(-1, 4, 2, columns).transpose(1, 2).reshape(rows, columns)
    return pack_bits(interleaved.t().contiguous(), BITS)


def _unpack_columns(words: Tensor) -> Tensor:
    """The inverse: words [columns, out / 8] -> [out, columns]."""
    columns, rows = words.shape[0], words.shape[1] * PER_WORD
    interleaved = unpack_bits(words, BITS, rows).t()
    return interleaved.contiguous().view(-1, 2, 4, columns).transpose(1, 2).reshape(rows, columns)


def config(
    quantized: Sequence[QuantizedLayer],
    kept: Sequence[str],
    fused: Fused,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
    static_groups: bool = False,
) -> dict[str, Any]:
    check_layers(quantized, kept, fused)
    name, scheme = quantized[0]
    for other in quantized:
        if other.scheme != scheme:
            raise SchemeError(
                f"awq holds one scheme, got {scheme} for {name} and {other.scheme} for {other.name}; "
                "use one scheme, or gptq or compressed-tensors",
                (name, other.name),
            )
        if is_lm_head(other.name):
            raise SchemeError(f"{other.name}: readers of awq expect it in 16 bit; keep it so, or use gptq")
    if desc_act:
        raise SchemeError("awq has no act-order; gptq holds it")
    result: dict[str, Any] = {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        # The file holds zero points also when they are all 8, and the fast kernels refuse a file that says it has none.
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": with_fused(kept, fused),
    }
    inner = [name for name in kept if not is_lm_head(name)]
    if inner:  # GPTQModel reads this and not the list above
        result["dynamic"] = {f"-:{pattern(with_fused(inner, fused))}": {}}
    return result


def reads(config: Mapping[str, Any]) -> Resolve:
    """What a config of any tool says of each linear.

    The lists of 16-bit layers are matched by substring in some readers and by name in others, so only an exact name
    counts.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version not in VERSIONS:
        raise ModelError(f"awq version {version!r:.40}: expected gemm; the layout of others is not read")
    if config.get("backend") == "llm-awq":
        raise ModelError("awq of llm-awq: its layout is not read; expected that of AutoAWQ")
    base = read_scheme(config, symmetric=config.get("zero_point") is False)
    kept = strings(config, "modules_to_not_convert")
    listed = dynamic(config, lambda changes: base)

    def resolve(name: str) -> Scheme | None:
        return None if name in kept else listed(name, base)

    return resolve


AWQ = Format(
    name="awq",
    quant_method="awq",
    settings_file="quant_config.json",
    stores_zeros=True,
    reads=reads,
    codes="qweight",
    holds_mixed=False,
    usual_for=lambda scheme, mixed: scheme.bits == 4 and not mixed,
    packages=("gptqmodel", "optimum", "accelerate"),
    specs=specs,
    why_not=why_not,
    min_zero=lambda scheme: 0,
    pack=pack,
    unpack=unpack,
    unpack_zeros=unpack_zeros,
    config=config,
    extra_files=no_extra_files,
)
