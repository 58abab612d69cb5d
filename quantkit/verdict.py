# SPDX-License-Identifier: Apache-2.0
"""The verdict: what was measured against the limits that a checkpoint must keep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.dtypes import LARGEST_FLOAT16, SERVED, WIDER
from quantkit.errors import InputError
from quantkit.records import Fit, Limits, Measured, Tokens, Verification
from quantkit.units import format_bytes

JUDGED = ("perplexity", "perplexity_fp16", "kl_divergence")
# Good 4-bit checkpoints of models from about one billion parameters stay well below 5%, and 3-bit ones without
# calibration do not.
DEFAULT_INCREASE = 0.05
# Sound checkpoints that keep a limit on perplexity have a KL well below 4 log(1 + limit), and agree with the original
# on the top token in a share of about 1 - sqrt(KL) / 2. Models that were hardly trained agree less. docs/verdict.md has
# the figures.
KL_PER_NLL = 4
DISAGREEMENT = 0.75  # times the square root of the KL
GUESSING = 2  # times the vocabulary; models that were never trained lie between one and this
CLOSE = 0.5  # a pass that has used more than this share of a limit is a weak one


def usual_kl(max_ppl_increase: float | None) -> float:
    """The limit on the KL that goes with one on perplexity, in nats."""
    return round(KL_PER_NLL * math.log1p(max(max_ppl_increase or 0.0, DEFAULT_INCREASE)), 2)


def least_top1(limits: Limits) -> float:
    """The top-1 agreement that goes with a limit on perplexity."""
    return max(0.0, 1 - DISAGREEMENT * math.sqrt(usual_kl(limits.max_ppl_increase)))


DEFAULT_LIMITS = Limits(max_ppl_increase=DEFAULT_INCREASE, max_kl=usual_kl(DEFAULT_INCREASE))


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
    """Of each limit the first that is given, or the default, which for the KL goes with the limit on perplexity."""
    increases = [limits.max_ppl_increase for limits in asked if limits.max_ppl_increase is not None]
    increase = increases[0] if increases else DEFAULT_INCREASE
    # A KL that went with another limit on perplexity was not asked for.
    kls = [kl for limits in asked if (kl := limits.max_kl) is not None and kl != usual_kl(limits.max_ppl_increase)]
    return Limits(max_ppl_increase=increase, max_kl=kls[0] if kls else usual_kl(increase))


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
    missing = [
        f"{name} is {measured.get(name)}, which is not a measurement; the quantized model is broken, or the FP16 one is"
        for name in JUDGED
        if measured.get(name) is None or not math.isfinite(measured[name])
    ]
    figures = missing or [*_too_far(measured, limits), *_guessing(measured)]
    others = measured.get("differences") or []
    return [*others, *_strange_weights(measured), *figures, *_beyond_float16(measured), *_too_large(fit)]


def close_to_limits(measured: Measured, limits: Limits) -> list[str]:
    """One line for each limit that is kept, with more than half of what it allows used up."""
    lines, increase, kl, top1 = [], measured.increase, measured.kl_divergence, measured.top1_agreement
    if increase is not None and limits.max_ppl_increase and increase > CLOSE * limits.max_ppl_increase:
        lines.append(
            f"close to a limit: perplexity rose by {increase:.2%}, of {limits.max_ppl_increase * 100:g}% allowed"
        )
    if kl is not None and limits.max_kl and kl > CLOSE * limits.max_kl:
        lines.append(f"close to a limit: KL divergence is {kl:.4g} nats, of {limits.max_kl:g} allowed")
    if top1 is not None and 1 - top1 > CLOSE * (1 - least_top1(limits)):
        lines.append(
            f"close to a limit: top-1 agreement is {top1:.1%}, and at least {least_top1(limits):.1%} is asked for"
        )
    return lines


def _too_far(measured: Mapping[str, Any], limits: Limits) -> list[str]:
    """How the quantized model is further from the original than allowed."""
    perplexity, reference, kl = (float(measured[name]) for name in JUDGED)
    increase, top1, reasons = perplexity / reference - 1, measured.get("top1_agreement"), []
    if limits.max_ppl_increase is not None and increase > limits.max_ppl_increase:
        reasons.append(
            f"perplexity {perplexity:.4g} is {increase:.2%} above FP16's {reference:.4g}; "
            f"the limit is {limits.max_ppl_increase * 100:g}%"
        )
    if limits.max_kl is not None and kl > limits.max_kl:
        reasons.append(f"KL divergence {kl:.4g} nats is above the limit of {limits.max_kl:g}")
    if top1 is not None and top1 < least_top1(limits):
        reasons.append(
            f"top-1 agreement {top1:.2%} is below {least_top1(limits):.1%}, the least that goes with the limit on "
            "perplexity"
        )
    return reasons


def _guessing(measured: Mapping[str, Any]) -> list[str]:
    """Whether the original itself predicts nothing."""
    vocabulary, reference = measured.get("vocabulary"), float(measured["perplexity_fp16"])
    if not vocabulary or reference <= GUESSING * vocabulary:
        return []
    return [
        f"the original's perplexity is {reference:,.0f}, worse than guessing among its {vocabulary:,} tokens: its "
        "weights are damaged, or the text was tokenized for another model; nothing can be said of the quantized one"
    ]


def _strange_weights(measured: Mapping[str, Any]) -> list[str]:
    return [
        f"{linear['name']}: its weights are not those of the original: their relative error is {linear['error']:.3g}, "
        f"and rounding to its bits explains {linear['expected']:.2g}"
        for linear in measured.get("strange_linears") or ()
    ]


def _beyond_float16(measured: Mapping[str, Any]) -> list[str]:
    largest = measured.get("largest_activation") or 0.0
    if measured.get("torch_dtype") != SERVED or largest <= LARGEST_FLOAT16:
        return []
    return [
        f"numbers reach {largest:,.0f} within the model, and config.json has it served in float16, which ends at "
        f'{LARGEST_FLOAT16:,.0f}; set "torch_dtype": "{WIDER}" there'
    ]


def _too_large(fit: Fit | None) -> list[str]:
    if fit is None or fit.fits:
        return []
    return [
        f"weights, KV cache and workspace take {format_bytes(fit.total_bytes)} at a context of {fit.context} "
        f"tokens, {format_bytes(fit.total_bytes - fit.budget_bytes)} more than the budget of "
        f"{format_bytes(fit.budget_bytes)}"
    ]
