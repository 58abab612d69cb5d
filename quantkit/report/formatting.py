# SPDX-License-Identifier: Apache-2.0
"""How the figures of a result document (quantkit.json) are written: shared by the report and the model card."""

import math
from collections import Counter
from collections.abc import Iterable

from quantkit.records import Fit, Numbers, Result
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


def schemes(layers: Iterable[Numbers]) -> dict[str, int]:
    """How many layers each scheme has, the most common first."""
    counts = Counter(layer.scheme_name for layer in layers)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def overall_scheme(result: Result) -> str:
    """The scheme of the whole checkpoint; "mixed" where its layers differ."""
    counts = schemes(result.layers)
    if len(counts) > 1:
        return f"mixed, {figure(result.bits_per_weight, 3)} bits per weight"
    return next(iter(counts), result.scheme.scheme_name)


def short_name(model: object) -> str:
    """The last part of a folder's path or a hub id; the name of a recipe as it is."""
    name = one_line(model)
    return name.rstrip("/").rpartition("/")[2] or name


def bytes_in_16_bit(result: Result) -> int | None:
    """What the tensors would take with every quantized linear in 16 bit; None if the document doesn't tell."""
    if result.tensor_bytes is None or not result.layers:
        return None
    weights = [layer.weights for layer in result.layers]
    return result.tensor_bytes + sum(2 * count for count in weights) - sum(layer.bytes for layer in result.layers)


def cache_bytes(fit: Fit, context: int) -> int:
    """The KV cache of one card at a context; layers with a sliding window stop growing at it."""
    return sum(x.layers * x.bytes_per_token * min(context, x.window or context) for x in fit.kv_layers)
