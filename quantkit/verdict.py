# SPDX-License-Identifier: Apache-2.0
"""The verdict: what was measured against the limits that a checkpoint must keep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.dtypes import LARGEST_FLOAT16, SERVED, WIDER
from quantkit.errors import InputError
from quantkit.records import Fit, Limits, Tokens, Verification
from quantkit.units import format_bytes

JUDGED = ("perplexity", "perplexity_fp16", "kl_divergence")
# Good 4-bit checkpoints of models from about one billion parameters stay well below 5%, and 3-bit ones without
# calibration do not. No limit on the KL suits every model and text.
DEFAULT_LIMITS = Limits(max_ppl_increase=0.05)


def asked_limits(max_ppl_increase: float | None, max_kl: float | None) -> Limits:
    """The limits of a command line.

    Raises:
        InputError: one that is no number of 0 or more.
    """
    for option, limit in (("--max-ppl-increase", max_ppl_increase), ("--max-kl", max_kl)):
        if limit is not None and not (math.isfinite(limit) and limit >= 0):
            raise InputError(f"{option}: expected a number of 0 or more, got {limit}")
    return Limits(max_ppl_increase=max_ppl_increase, max_kl=max_kl)


def choose_limits(*asked: Limits) -> Limits:
    """Of each limit the first that is given, or the default."""
    limits = (*asked, DEFAULT_LIMITS)
    given = {name: [v for each in limits if (v := getattr(each, name)) is not None] for name in Limits.model_fields}
    return Limits(**{name: values[0] if values else None for name, values in given.items()})


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


def verification_of(
    measured: Mapping[str, Any],
    evaluation: Tokens | None,
    limits: Limits,
    fit: Fit | None,
    reasons: Sequence[str] = (),
) -> Verification:
    """What was measured, on what, and the verdict.

    measured: the fields of `records.Measured`
    reasons: why it fails whatever was measured; figures are then not judged if there are none (no "tokens")
    """
    judged = objections(measured, limits, fit) if measured.get("tokens") or not reasons else []
    found = [*reasons, *judged]
    return Verification(
        **measured, eval=evaluation, limits=limits, fit=fit, verdict="fail" if found else "pass", reasons=found
    )


def judged_again(verification: Verification, limits: Limits, fit: Fit) -> Verification:
    """The same figures with a new verdict, by these limits and for this memory."""
    reasons = objections(verification.content(), limits, fit)
    return verification.having(limits=limits, fit=fit, verdict="fail" if reasons else "pass", reasons=reasons)


def objections(measured: Mapping[str, Any], limits: Limits, fit: Fit | None = None) -> list[str]:
    """One line for each limit that is not kept, and for each figure that is missing or not finite.

    fit: None: memory is not judged
    """
    reasons = [
        f"{name} is {measured.get(name)}, which is not a measurement; the quantized model is broken, or the FP16 one is"
        for name in JUDGED
        if measured.get(name) is None or not math.isfinite(measured[name])
    ]
    if not reasons:
        perplexity, reference, kl = (float(measured[name]) for name in JUDGED)
        increase = perplexity / reference - 1
        if limits.max_ppl_increase is not None and increase > limits.max_ppl_increase:
            reasons.append(
                f"perplexity {perplexity:.4g} is {increase:.2%} above FP16's {reference:.4g}; "
                f"the limit is {limits.max_ppl_increase * 100:g}%"
            )
        if limits.max_kl is not None and kl > limits.max_kl:
            reasons.append(f"KL divergence {kl:.4g} nats is above the limit of {limits.max_kl:g}")
    largest = measured.get("largest_activation") or 0.0
    if measured.get("torch_dtype") == SERVED and largest > LARGEST_FLOAT16:
        reasons.append(
            f"numbers reach {largest:,.0f} within the model, and config.json has it served in float16, which ends at "
            f'{LARGEST_FLOAT16:,.0f}; set "torch_dtype": "{WIDER}" there'
        )
    if fit is not None and not fit.fits:
        reasons.append(
            f"weights, KV cache and workspace take {format_bytes(fit.total_bytes)} at a context of {fit.context} "
            f"tokens, {format_bytes(fit.total_bytes - fit.budget_bytes)} more than the budget of "
            f"{format_bytes(fit.budget_bytes)}"
        )
    return reasons
