# SPDX-License-Identifier: Apache-2.0
"""What each linear becomes in another format: as it is, or why it must be rounded again."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from quantkit.convert.survey import Held, shape_of, survey
from quantkit.errors import SchemeError
from quantkit.formats import Format
from quantkit.plan import STORED, LinearPlan
from quantkit.quantized import QuantizedCheckpoint
from quantkit.scheme import MAX_BITS, MIN_BITS, Scheme


@dataclass(frozen=True)
class Target:
    """A linear of the output: its plan, the scheme that it had, and why it must be rounded again (None: it need not).

    scale_dtype: of the output's scales
    """

    linear: LinearPlan
    before: LinearPlan
    obstacle: str | None = None
    scale_dtype: str = STORED
    scales_only: bool = False


def obstacle(fmt: Format, held: Held, shape: tuple[int, int]) -> str | None:
    """None if the format holds the linear as it is, else why not, in one line."""
    if reason := fmt.why_not(held.scheme, *shape):
        return reason
    if held.scattered and "g_idx" not in fmt.specs(held.scheme, *shape):
        return "act-order (g_idx): groups of columns that are not side by side, which gptq and gptq_v2 hold"
    if held.smallest_zero < fmt.min_zero(held.scheme):
        return f"a zero point of {held.smallest_zero}, which {fmt.name} does not hold safely; gptq_v2 holds it"
    return _scale_obstacle(fmt, held)


def _scale_obstacle(fmt: Format, held: Held) -> str | None:
    if held.scale_dtype == STORED or fmt.wide_scales:
        return None
    name = held.scale_dtype
    return f"scales in {name} that float16 does not hold exactly; compressed-tensors holds them"


def nearest(fmt: Format, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
    """The scheme that the format holds with the fewest losses: as many bits or more before fewer, smaller groups."""
    bits = sorted(range(MIN_BITS, MAX_BITS + 1), key=lambda b: (b < scheme.bits, abs(b - scheme.bits)))
    groups = [scheme.group_size, *(g for g in (128, 64, 32) if g < scheme.columns_per_group(shape[1]))]
    options = (Scheme(b, g, scheme.symmetric) for b in bits for g in groups)
    return next((option for option in options if fmt.why_not(option, *shape) is None), None)


def choose_targets(source: QuantizedCheckpoint, fmt: Format | None, *, requantize: bool) -> tuple[Target, ...]:
    """What each linear becomes.

    Raises:
        SchemeError: the format cannot hold one as it is and requantize is False, or cannot hold it at all.
    """
    held = survey(source)
    if fmt is None:
        return tuple(Target(replace(linear, scheme=None), linear) for linear in source.linears)
    targets = [_target(fmt, x, held[x.name]) if x.scheme else Target(x, x) for x in source.linears]
    if not fmt.holds_mixed:
        targets = _one_scheme(fmt, targets)
    refused = [target for target in targets if target.obstacle is not None]
    if refused and not requantize:
        others = f" (and {len(refused) - 1} other linears)" if len(refused) > 1 else ""
        raise SchemeError(
            f"{refused[0].linear.name}{others}: {refused[0].obstacle}; "
            "--requantize rounds what does not fit again, and measures the loss"
        )
    return tuple(targets)


def _target(fmt: Format, linear: LinearPlan, held: Held) -> Target:
    shape, before = shape_of(linear), linear
    reason = obstacle(fmt, held, shape)
    if reason is None:
        return Target(replace(linear, scheme=held.scheme), before, None, held.scale_dtype)
    if reason == _scale_obstacle(fmt, held):
        return Target(replace(linear, scheme=held.scheme), before, reason, scales_only=True)
    scheme = nearest(fmt, held.scheme, shape)
    if scheme is None:
        raise SchemeError(f"{linear.name}: {reason}")
    return Target(replace(linear, scheme=scheme), before, reason)


def spec_arguments(linear: LinearPlan) -> tuple[Scheme, int, int]:
    """What `Format.specs` takes for a quantized linear."""
    assert linear.scheme is not None
    return (linear.scheme, *shape_of(linear))


def _one_scheme(fmt: Format, targets: list[Target]) -> list[Target]:
    """All with the scheme that most weights have already."""
    counts: Counter[Scheme] = Counter()
    for target in targets:
        if target.linear.scheme is not None:
            counts[target.linear.scheme] += math.prod(shape_of(target.linear))
    ((base, _),) = counts.most_common(1)

    def alike(target: Target) -> Target:
        if target.linear.scheme in (None, base):
            return target
        if reason := fmt.why_not(base, *shape_of(target.linear)):
            raise SchemeError(f"{target.linear.name}: {reason}")
        reason = target.obstacle or f"{fmt.name} holds one scheme, {base} here, and this is {target.linear.scheme}"
        return replace(
            target, linear=replace(target.linear, scheme=base), obstacle=reason, scales_only=False, scale_dtype=STORED
        )

    return [alike(target) for target in targets]
