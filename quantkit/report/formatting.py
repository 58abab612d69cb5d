# SPDX-License-Identifier: Apache-2.0
"""How the figures of a result document (quantkit.json) are written: shared by the report and the model card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.text import one_line
from quantkit.units import format_bytes

NOT_MEASURED = "not measured"


def figure(value: float | None, digits: int = 4) -> str:
    """4 significant digits; what is missing or not a number says so."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else "not a number"
    return f"{value:#.{digits}g}" if 1e-4 <= abs(value) < 10**digits else f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return figure(value)
    return f"{value:{'+' if signed else ''}.{digits}%}"


def limit(value: float) -> str:
    """A limit as it was given: 0.05 -> "5%"."""
    return f"{value * 100:g}%"


def size(count: int | None) -> str:
    return NOT_MEASURED if count is None else format_bytes(count)


def exact(count: int | None) -> str:
    return NOT_MEASURED if count is None else f"{count:,} bytes"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def tokens(count: int) -> str:
    """A context as `--context` takes it: 16384 -> "16k"; other numbers in full."""
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def scheme(bits: int, group_size: int, symmetric: bool) -> str:
    if bits == 16:
        return "16 bit"
    group = "rows" if group_size == -1 else f"g{group_size}"
    return f"W{bits} {group} {'sym' if symmetric else 'asym'}"


def schemes(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many layers each scheme has, the most common first."""
    counts: dict[str, int] = {}
    for layer in layers:
        label = scheme(layer["bits"], layer["group_size"], layer["symmetric"])
        counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def overall_scheme(result: Mapping[str, Any]) -> str:
    """The scheme of the whole checkpoint; "mixed" where its layers differ."""
    found = schemes(result.get("layers") or [])
    if len(found) > 1:
        return f"mixed, {figure(result['bits_per_weight'], 3)} bits per weight"
    asked = result["scheme"]
    return next(iter(found), scheme(asked["bits"], asked["group_size"], asked["symmetric"]))


def short_name(model: object) -> str:
    """The last part of a folder's path or a hub id; the name of a recipe as it is."""
    name = one_line(model)
    return name.rstrip("/").rpartition("/")[2] or name


def increase(verification: Mapping[str, Any]) -> float | None:
    """How far perplexity rose above FP16's, relative; None if either is missing or not finite."""
    quantized, reference = verification.get("perplexity"), verification.get("perplexity_fp16")
    if quantized is None or not reference or not (math.isfinite(quantized) and math.isfinite(reference)):
        return None
    return float(quantized / reference - 1)


def bytes_in_16_bit(result: Mapping[str, Any]) -> int | None:
    """What the tensors would take with every quantized linear in 16 bit; None if the document doesn't tell."""
    layers = result.get("layers") or []
    stored = result.get("tensor_bytes")
    if stored is None or not layers or any(layer.get(k) is None for layer in layers for k in _SHAPE):
        return None
    linears = sum(2 * layer["out_features"] * layer["in_features"] - layer["bytes"] for layer in layers)
    return int(stored + linears)


_SHAPE = ("bytes", "out_features", "in_features")


def on_a_card(fit: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a fit document that holds weights_, kv_ and workspace_bytes of one card."""
    own: Mapping[str, Any] = fit.get("tensor_parallel") or fit
    return own


def cache_bytes(fit: Mapping[str, Any], context: int) -> int:
    """The KV cache of one card at a context; layers with a sliding window stop growing at it."""
    kept = fit.get("kv_layers")
    if not kept:
        return int(on_a_card(fit)["kv_bytes_per_token"] * context)
    return sum(x["layers"] * x["bytes_per_token"] * min(context, x["window"] or context) for x in kept)
