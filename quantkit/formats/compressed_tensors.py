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

import math
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
    why_not_grid,
    why_not_groups,
)
from quantkit.formats.bits import WORD_BITS, pack_bits, unpack_bits, words_for
from quantkit.formats.fields import Resolve, json_object, read_scheme, strings
from quantkit.formats.fields import pattern as compiled
from quantkit.formats.names import Fused, QuantizedLayer, check_layers, is_lm_head, pattern, with_fused
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = "pack-quantized"


def why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    if scheme.grid != "integer":
        return why_not_grid("compressed-tensors", scheme)
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
    fused: Fused,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
    static_groups: bool = False,
) -> dict[str, Any]:
    """One config group a scheme. A single scheme targets every Linear; several target disjoint lists of names.

    A head is always named: to vLLM it is no Linear.
    """
    check_layers(quantized, kept, fused)
    if desc_act:
        raise SchemeError("compressed-tensors has no act-order; gptq holds it")
    schemes = list(dict.fromkeys(scheme for _, scheme in quantized))
    groups = {}
    for index, scheme in enumerate(schemes):
        names = [name for name, other in quantized if other == scheme]
        heads = [f"re:{pattern([name])}" for name in names if is_lm_head(name)]
        targets = ["Linear", *heads] if len(schemes) == 1 else [f"re:{pattern(with_fused(names, fused))}"]
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


# ---------------------------------------------------------------- files of other tools


def reads(config: Mapping[str, Any]) -> Resolve:
    """What a config of any tool says of each linear: names come before "re:" patterns before class names."""
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise ModelError(f"compressed-tensors {key}: not supported; only quantized weights are read")
    if json_object(config, "sparsity_config").get("format", "dense") != "dense":
        raise ModelError("compressed-tensors sparsity_config: sparse weights are not read")
    targets: dict[str, Mapping[str, Any]] = {}
    for label, group in json_object(config, "config_groups").items():
        if not isinstance(group, Mapping):
            raise ModelError(f"config_groups.{label}: expected an object, got {group!r:.40}")
        complete = {"format": config.get("format")} | {key: value for key, value in group.items() if value is not None}
        targets |= dict.fromkeys(strings(group, "targets"), complete)
    ignored = strings(config, "ignore")
    # As its `match_targets`: exact names, then patterns, each in order; a class name is the least specific.
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    ordered = [*(t for t in ordered if t not in _CLASSES), *(t for t in ordered if t in _CLASSES)]

    def resolve(name: str) -> Scheme | None:
        if any(_matches(target, name) for target in ignored):
            return None
        target = next((target for target in ordered if _matches(target, name)), None)
        return None if target is None else _group_scheme(name, targets[target])

    return resolve


_CLASSES = ("Linear", "Module")  # the classes that an nn.Linear is of


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return compiled(target.removeprefix("re:"))(name)
    return target == name or target in _CLASSES


def _group_scheme(name: str, group: Mapping[str, Any]) -> Scheme | None:
    weights = json_object(group, "weights")
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
    return read_scheme(fields, symmetric=bool(weights.get("symmetric", True)))


def _padded_words(count: int, bits: int) -> int:
    return math.ceil(count / (WORD_BITS // bits))


def padded_shape(key: str, scheme: Scheme, shape: tuple[int, int], dense: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of words that hold whole codes only; other tensors are as they are."""
    out_features, in_features = shape
    if key == "weight_packed":
        return (dense[0], _padded_words(in_features, scheme.bits))
    if key == "weight_zero_point":
        return (_padded_words(out_features, scheme.bits), dense[1])
    return dense


def _closed_up(key: str, words: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
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


def closed_up(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors as the library writes them from 0.20 on: words of whole codes only are closed up."""
    return {key: _closed_up(key, tensor, scheme, shape) for key, tensor in tensors.items()}


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    quant_method="compressed-tensors",
    version_key="version",
    wide_scales=True,
    reads=reads,
    codes="weight_packed",
    older=closed_up,
    scales=lambda tensors: tensors.get("weight_scale"),
    older_shape=padded_shape,
    says_all=True,
    holds_mixed=True,
    packages=("compressed-tensors", "accelerate"),
    zeros_dequantized=True,
    specs=specs,
    why_not=why_not,
    min_zero=lambda scheme: 0,
    pack=pack,
    unpack=unpack,
    unpack_zeros=unpack_zeros,
    config=config,
    extra_files=no_extra_files,
)
