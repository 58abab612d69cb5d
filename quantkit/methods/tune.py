# SPDX-License-Identifier: Apache-2.0
"""Tuning a rounded block by gradients, so that the block as a whole does again what the original block did.

Every weight has a position on its grid, in units of codes, that starts where GPTQ left it: in the cell of its code, as
near as that allows to the weight it stands for. Positions and scales are moved to lower a loss of the block's output;
rounding passes gradients straight through. So a weight is rounded the other way where that helps its block, whatever
it does to its own linear (AdaRound, arXiv 2004.10568; AutoRound, arXiv 2309.05516; EfficientQAT, arXiv 2407.11062).

The positions that are rounded at the end are the mean over the second half of the steps: what the last steps happened
to see has less say then (stochastic weight averaging, arXiv 1803.05407).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.methods.grid import to_float16
from quantkit.scheme import QuantizedTensor, expand

INSIDE = 0.48  # of a code's cell, from its middle: a start on the edge would be rounded either way
TRAVEL = 0.16  # how far a position that always moves one way gets, in codes
SCALE_TRAVEL = 0.03  # the same for scales, as a share of the mean scale of their linear
FEWEST_STEPS = 64
BETAS = (0.9, 0.95)

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def offsets(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Where a weight [out, in] lies in the cell of its code: float16 [out, in], 0 in the middle, within INSIDE."""
    columns = quantized.in_features // quantized.scales.shape[1]
    steps = quantized.codes.float() - expand(quantized.zeros.float(), columns)
    position = weight.float() / expand(quantized.scales.float(), columns)
    return (position - steps).clamp_(-INSIDE, INSIDE).to(torch.float16)


class _Dequantize(torch.autograd.Function):
    """(round(position) - zero) * scale; gradients go straight through the rounding, but not beyond the last code."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, max_code: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(position, scale, zero)
        ctx.max_code = max_code
        steps = position.round().clamp_(0, max_code).unflatten(1, (scale.shape[1], -1)).sub_(zero.unsqueeze(2))
        weight: Tensor = steps.mul_(scale.unsqueeze(2)).flatten(1).to(dtype)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        position, scale, zero = ctx.saved_tensors
        grouped = gradient.float().unflatten(1, (scale.shape[1], -1))
        steps = position.round().clamp_(0, ctx.max_code).unflatten(1, (scale.shape[1], -1)).sub_(zero.unsqueeze(2))
        to_scale = steps.mul_(grouped).sum(2)
        inside = (position > -0.5) & (position < ctx.max_code + 0.5)
        to_position = (grouped * scale.unsqueeze(2)).flatten(1).mul_(inside)
        return to_position, to_scale, None, None, None


def _dequantize(position: Tensor, scale: Tensor, zero: Tensor, max_code: int, dtype: torch.dtype) -> Tensor:
    weight = _Dequantize.apply(position, scale, zero, max_code, dtype)  # type: ignore[no-untyped-call]
    assert isinstance(weight, Tensor)
    return weight


def tune(
    quantized: Mapping[str, QuantizedTensor],
    starts: Mapping[str, Tensor],
    losses: Sequence[Loss],
    dtype: torch.dtype = torch.float32,
) -> dict[str, QuantizedTensor]:
    """Lower the losses, one step for each, by moving codes and scales.

    starts: name -> `offsets`; losses: each takes name -> weight [out, in] (in `dtype`) and gives a scalar of order 1,
    and is called once, in order. Zero points stay.
    """
    names = list(quantized)
    positions = {n: (q.codes.float() + starts[n].float()).requires_grad_() for n, q in quantized.items()}
    scales = {n: q.scales.float().requires_grad_() for n, q in quantized.items()}
    zeros = {n: q.zeros.float() for n, q in quantized.items()}
    # Steps shrink linearly to nothing: a first step of 2 / count makes them 1 in sum. Few steps go less far.
    first = 2 / max(len(losses), FEWEST_STEPS)
    groups = [{"params": list(positions.values()), "lr": TRAVEL * first}]
    groups += [{"params": [s], "lr": SCALE_TRAVEL * first * float(s.detach().abs().mean())} for s in scales.values()]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(losses))
    averaged = {n: torch.zeros_like(p) for n, p in positions.items()}
    second_half = len(losses) // 2
    for step, loss in enumerate(losses):
        with torch.enable_grad():
            weights = {
                n: _dequantize(positions[n], scales[n], zeros[n], quantized[n].scheme.max_code, dtype) for n in names
            }
            loss(weights).backward()
        del weights
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step >= second_half:
            for n in names:
                averaged[n].lerp_(positions[n].detach(), 1 / (step - second_half + 1))
    return {n: _settled(quantized[n], averaged[n], scales[n].detach()) for n in names}


def _settled(before: QuantizedTensor, position: Tensor, scales: Tensor) -> QuantizedTensor:
    codes = position.round().clamp_(0, before.scheme.max_code).to(torch.uint8)
    kept = scales.sign() == before.scales.float().sign()  # a scale has no way through zero
    return replace(before, codes=codes, scales=torch.where(kept, to_float16(scales), before.scales))
