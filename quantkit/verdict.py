# SPDX-License-Identifier: Apache-2.0
"""The verdict: whether the figures of `pipeline.metrics`, and the memory of serving it, keep to their limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.dtypes import LARGEST_FLOAT16, SERVED, WIDER
from quantkit.errors import InputError
from quantkit.units import format_bytes


@dataclass(frozen=True)
class Limits:
    """What a checkpoint must keep to pass.

    max_ppl_increase: how far perplexity may rise above FP16's, relative: 0.05 is 5%, which good 4-bit checkpoints of
        models from about one billion parameters stay well below, and 3-bit ones without calibration do not
    max_kl: the largest mean KL divergence in nats; None: not limited, as no figure suits every model and text
    """

    max_ppl_increase: float = 0.05
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("--max-ppl-increase", self.max_ppl_increase), ("--max-kl", self.max_kl)):
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise InputError(f"{name}: expected a number of 0 or more, got {limit}")


def parse_percent(text: str) -> float:
    """Read a percentage: "5%" -> 0.05.

    Raises:
        InputError: not a percentage of 0 or more. The sign is required: 0.05 could mean either of two things.
    """
    number, sign, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not sign or rest or not (math.isfinite(value) and value >= 0):
        raise InputError(f"--max-ppl-increase: expected a percentage such as 5% or 0.5%, got {text!r}")
    return value / 100


def verdict(metrics: Mapping[str, Any], limits: Limits, fit: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{"verdict": "pass" | "fail", "reasons": one line for each limit that is not kept}.

    metrics: as `metrics.Comparison.result` returns them; a figure that is missing or not finite fails
    fit: "total_bytes" against "budget_bytes" and whether it "fits"; None, or no budget: memory is not judged
    """
    figures = [metrics.get(name) for name in ("perplexity", "perplexity_fp16", "kl_divergence")]
    reasons = [
        f"{name} is {figure}, which is not a measurement; the quantized model is broken, or the FP16 one is"
        for name, figure in zip(("perplexity", "perplexity_fp16", "kl_divergence"), figures, strict=True)
        if figure is None or not math.isfinite(figure)
    ]
    if not reasons:
        perplexity, reference, kl = (float(figure) for figure in figures if figure is not None)
        increase = perplexity / reference - 1
        if increase > limits.max_ppl_increase:
            reasons.append(
                f"perplexity {perplexity:.4g} is {increase:.2%} above FP16's {reference:.4g}; "
                f"the limit is {limits.max_ppl_increase * 100:g}%"
            )
        if limits.max_kl is not None and kl > limits.max_kl:
            reasons.append(f"KL divergence {kl:.4g} nats is above the limit of {limits.max_kl:g}")
    largest = metrics.get("largest_activation") or 0.0
    if metrics.get("torch_dtype") == SERVED and largest > LARGEST_FLOAT16:
        reasons.append(
            f"numbers reach {largest:,.0f} within the model, and config.json has it served in float16, which ends at "
            f'{LARGEST_FLOAT16:,.0f}; set "torch_dtype": "{WIDER}" there'
        )
    if fit is not None and fit.get("budget_bytes") is not None and not fit.get("fits"):
        total, budget = int(fit["total_bytes"]), int(fit["budget_bytes"])
        context = f" at a context of {fit['context']} tokens" if fit.get("context") is not None else ""
        reasons.append(
            f"weights, KV cache and workspace take {format_bytes(total)}{context}, "
            f"{format_bytes(total - budget)} more than the budget of {format_bytes(budget)}"
        )
    return {"verdict": "fail" if reasons else "pass", "reasons": reasons}


def verification_block(
    measured: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    limits: Limits,
    fit: Mapping[str, Any] | None,
    reasons: Sequence[str] = (),
) -> dict[str, Any]:
    """The "verification" of a result document: what was measured, on what, and the verdict.

    reasons: why it fails whatever was measured; figures are then not judged if there are none ("tokens" is None).
    JSON has no infinities: a figure that is not finite, which the verdict tells, becomes None.
    """
    judged = verdict(measured, limits, fit)["reasons"] if measured.get("tokens") or not reasons else []
    block = {
        **measured,
        "eval": evaluation,
        "limits": {"max_ppl_increase": limits.max_ppl_increase, "max_kl": limits.max_kl},
        "fit": fit,
        "verdict": "fail" if [*reasons, *judged] else "pass",
        "reasons": [*reasons, *judged],
    }
    without_infinities: dict[str, Any] = _without_infinities(block)
    return without_infinities


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_infinities(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
