# SPDX-License-Identifier: Apache-2.0
"""GPTQ v1 and v2: the layout of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel), 2, 3, 4 and 8 bits.

    qweight  int32   [in * bits / 32, out]       one little-endian bit stream down each column
    qzeros   int32   [groups, out * bits / 32]   one along each row; v1 stores z - 1, v2 stores z
    scales   float16 [groups, out]
    g_idx    int32   [in]                        the group of each input column

v1 has no room for z = 0: z - 1 wraps to the largest code, and readers that add the 1 to whole words carry it into the
neighbouring zero point. So v1 is packed with z >= 1 only, and a wrapped one is read as AutoGPTQ reads it: as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.errors import ModelError, SchemeError
from quantkit.formats.base import (
    ConfigBuilder,
    Format,
    TensorSpec,
    check_symmetric,
    matching,
    require,
    why_not_grid,
    why_not_groups,
)
from quantkit.formats.bits import WORD_BITS, pack_bits, unpack_bits, words_for
from quantkit.formats.fields import Resolve, dynamic, read_scheme
from quantkit.formats.names import Fused, QuantizedLayer, check_layers, is_lm_head, pattern, with_fused
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = (2, 3, 4, 8)


def why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    if scheme.grid != "integer":
        return why_not_grid("gptq", scheme)
    if scheme.bits not in BITS:
        return f"gptq holds 2, 3, 4 and 8 bits, got {scheme.bits}; compressed-tensors holds 2 to 8"
    for what, count in (("out_features", out_features), ("in_features", in_features)):
        if count * scheme.bits % WORD_BITS:
            divisor = next(n for n in (4, 8, 16, 32) if n * scheme.bits % WORD_BITS == 0)
            return (
                f"gptq at {scheme.bits} bits needs {what} divisible by {divisor}, got {count}; "
                "compressed-tensors holds any"
            )
    return why_not_groups(scheme, in_features)


def specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    require(why_not(scheme, out_features, in_features))
    groups = scheme.groups(in_features)
    return {
        "qweight": TensorSpec("int32", (words_for(in_features, scheme.bits), out_features)),
        "qzeros": TensorSpec("int32", (groups, words_for(out_features, scheme.bits))),
        "scales": TensorSpec("float16", (groups, out_features)),
        "g_idx": TensorSpec("int32", (in_features,)),
    }


def pack(quantized: QuantizedTensor, *, v1: bool) -> dict[str, Tensor]:
    scheme = quantized.scheme
    require(why_not(scheme, quantized.out_features, quantized.in_features))
    zeros = quantized.zeros
    if v1:
        if not zeros.all():
            raise SchemeError("gptq (v1) cannot hold a zero point of 0 safely; gptq_v2 holds it")
        zeros = zeros - 1
    g_idx = quantized.g_idx
    if g_idx is None:
        g_idx = _natural_groups(scheme, quantized.in_features, quantized.codes.device)
    return {
        "qweight": pack_bits(quantized.codes, scheme.bits).t().contiguous(),
        "qzeros": pack_bits(zeros.t(), scheme.bits),
        "scales": quantized.scales.t().contiguous(),
        "g_idx": g_idx.int(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], *, v1: bool) -> QuantizedTensor:
    _, in_features = shape
    expected = specs(scheme, *shape)
    if "g_idx" not in tensors:  # AutoRound leaves it out
        del expected["g_idx"]
    qweight, _, scales, *rest = matching(tensors, expected)
    in_order = _natural_groups(scheme, in_features, qweight.device)
    g_idx = rest[0] if rest else in_order
    zeros = unpack_zeros(tensors, scheme, shape, v1=v1)
    groups = scales.shape[0]
    if not ((g_idx >= 0) & (g_idx < groups)).all():
        raise ModelError(
            f"g_idx: expected groups 0 to {groups - 1}, got {int(g_idx.min())} to {int(g_idx.max())}; "
            "the file is damaged"
        )
    return QuantizedTensor(
        codes=unpack_bits(qweight.t(), scheme.bits, in_features),
        scales=scales.t().contiguous(),
        zeros=zeros,
        scheme=scheme,
        g_idx=None if g_idx.equal(in_order) else g_idx,
    )


def unpack_zeros(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], *, v1: bool) -> Tensor:
    """uint8 [out, groups], from qzeros alone."""
    (qzeros,) = matching(tensors, {"qzeros": specs(scheme, *shape)["qzeros"]})
    zeros = unpack_bits(qzeros, scheme.bits, shape[0]).t().contiguous()
    if v1:
        zeros = (zeros + 1).bitwise_and_(scheme.max_code)
    check_symmetric(zeros, scheme)
    return zeros


def _natural_groups(scheme: Scheme, in_features: int, device: torch.device) -> Tensor:
    """int32 [in]: column k is in group k // group_size."""
    import torch  # here and not above: see `dtypes`

    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    return columns // scheme.columns_per_group(in_features)


def config(
    quantized: Sequence[QuantizedLayer],
    kept: Sequence[str],
    fused: Fused,
    *,
    checkpoint_format: str,
    damp_percent: float = 0.01,
    desc_act: bool = False,
    static_groups: bool = False,
) -> dict[str, Any]:
    """The base keys hold the most common scheme; `dynamic` names the linears that differ."""
    check_layers(quantized, kept, fused)
    ((base, _),) = Counter(scheme for _, scheme in quantized).most_common(1)
    result: dict[str, Any] = {
        "quant_method": "gptq",
        **_scheme_keys(base),
        "desc_act": desc_act,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "lm_head": any(is_lm_head(name) for name, _ in quantized),
        "damp_percent": damp_percent,
        "true_sequential": True,
        "static_groups": static_groups,
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }
    # Engines and GPTQModel read `dynamic`, transformers `modules_in_block_to_quantize`; a 16-bit head needs neither.
    inner = [name for name in kept if not is_lm_head(name)]
    dynamic: dict[str, Any] = {}
    if inner:
        dynamic[f"-:{pattern(with_fused(inner, fused))}"] = {}
        result["modules_in_block_to_quantize"] = [[name for name, _ in quantized]]
    for scheme in dict.fromkeys(scheme for _, scheme in quantized if scheme != base):
        names = [name for name, other in quantized if other == scheme]
        dynamic[f"+:{pattern(with_fused(names, fused))}"] = _scheme_keys(scheme)
    if dynamic:
        result["dynamic"] = dynamic
    return result


def _scheme_keys(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def extra_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """AutoGPTQ reads this file and not config.json."""
    return {"quantize_config.json": config}


def reads(config: Mapping[str, Any], *, checkpoint_format: str) -> Resolve | None:
    """What a config of any tool says of each linear; None: it is of the other version.

    checkpoint_format (or format) tells v1 from v2, none is v1; `dynamic` is an ordered table of regular expressions,
    "-:" in 16 bit, of which the first that matches counts.
    """
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format") or version not in ("gptq", "gptq_v2"):
        stored = "marlin" if config.get("is_marlin_format") else version
        raise ModelError(
            f"gptq checkpoint_format {stored!r:.40}: expected gptq or gptq_v2; repacked files are not read"
        )
    if version != checkpoint_format:
        return None

    def scheme(changes: Mapping[str, Any]) -> Scheme:
        merged = {**config, **changes}
        return read_scheme(merged, symmetric=bool(merged.get("sym", True)))

    base, listed = scheme({}), dynamic(config, scheme)
    return lambda name: listed(name, base)


def _format(checkpoint_format: str, *, v1: bool) -> Format:
    builder: ConfigBuilder = partial(config, checkpoint_format=checkpoint_format)
    return Format(
        name=checkpoint_format,
        quant_method="gptq",
        settings_file="quantize_config.json",
        reads=partial(reads, checkpoint_format=checkpoint_format),
        codes="qweight",
        holds_mixed=True,
        usual_for=lambda scheme, mixed: scheme.symmetric == v1 and not mixed,
        packages=("gptqmodel", "optimum", "accelerate"),
        specs=specs,
        why_not=why_not,
        min_zero=lambda scheme: int(v1 and not scheme.symmetric),
        pack=partial(pack, v1=v1),
        unpack=partial(unpack, v1=v1),
        unpack_zeros=partial(unpack_zeros, v1=v1),
        config=builder,
        extra_files=extra_files,
        optional=("g_idx",),
    )


GPTQ = _format("gptq", v1=True)
GPTQ_V2 = _format("gptq_v2", v1=False)
