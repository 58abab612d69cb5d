# SPDX-License-Identifier: Apache-2.0
"""Tuning a rounded block by gradients, so that the block as a whole does again what the original block did.

Every weight has a position on its grid, in units of levels, that starts where GPTQ left it: in the cell of its code, as
near as that allows to the weight it stands for. Positions and scales are moved to lower a loss of the block's output;
rounding passes gradients straight through. So a weight is rounded the other way where that helps its block, whatever
it does to its own linear (AdaRound, arXiv 2004.10568; AutoRound, arXiv 2309.05516; EfficientQAT, arXiv 2407.11062).

The positions that are rounded at the end are the mean over the second half of the steps: what the last steps happened
to see has less say then (stochastic weight averaging, arXiv 1803.05407).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.grids.base import Grid, Levels, Spacing, divisible, parameters_of, with_codes
from quantkit.grids.registry import codes_of, grid_of, levels_of, values
from quantkit.scheme import QuantizedTensor

INSIDE = 0.48  # of a code's cell, from its middle: a start on the edge would be rounded either way
TRAVEL = 0.16  # how far a position that always moves one way gets, in codes
SCALE_TRAVEL = 0.03  # the same for scales, as a share of the mean scale of their linear
FEWEST_STEPS = 64
BETAS = (0.9, 0.95)

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def offsets(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Where a weight [out, in] lies in the cell of its level: float16 [out, in], 0 at the level, within INSIDE."""
    grid, spacing, levels = _grid(quantized)
    grouped = weight.float().unflatten(1, (spacing.scales.shape[1], -1))
    if spacing.lows is not None:
        grouped = grouped + spacing.lows.unsqueeze(2)
    stands = values(grid, quantized.codes.unflatten(1, (spacing.scales.shape[1], -1)), spacing.zeros.unsqueeze(2))
    position = grouped / divisible(spacing.scales).unsqueeze(2)
    inside = INSIDE * levels.cell
    result: Tensor = (position - stands).clamp_(-inside, inside).flatten(1).to(torch.float16)
    return result


def _grid(quantized: QuantizedTensor) -> tuple[Grid, Spacing, Levels]:
    grid = grid_of(quantized.scheme)
    levels = levels_of(grid, quantized.scheme, quantized.codes.device)
    return grid, grid.spacing(parameters_of(quantized)), levels


class _Dequantize(torch.autograd.Function):
    """scale * level nearest to the position; gradients go straight through the rounding, but not beyond the ends."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scale: Tensor, spacing: Spacing, levels: Levels, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(position, scale)
        ctx.spacing, ctx.levels = spacing, levels
        weight: Tensor = _nearest(position, spacing, levels).mul_(scale.unsqueeze(2))
        if spacing.lows is not None:
            weight.sub_(spacing.lows.unsqueeze(2))
        return weight.flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        position, scale = ctx.saved_tensors
        grouped = gradient.float().unflatten(1, (scale.shape[1], -1))
        to_scale = _nearest(position, ctx.spacing, ctx.levels).mul_(grouped).sum(2)
        least, most = ctx.levels.ends
        inside = (position > least) & (position < most)
        to_position = (grouped * scale.unsqueeze(2)).flatten(1).mul_(inside)
        return to_position, to_scale, None, None, None


def _nearest(position: Tensor, spacing: Spacing, levels: Levels) -> Tensor:
    """The level nearest to each position [out, in], which is counted from the origin: [out, groups, columns]."""
    grouped: Tensor = position.unflatten(1, (spacing.scales.shape[1], -1))
    zeros = spacing.zeros.unsqueeze(2)
    if levels.table is None:
        return grouped.round().clamp_(0, levels.max_code).sub_(zeros)
    return levels.nearest(grouped.clone(), zeros)


def _dequantize(position: Tensor, scale: Tensor, spacing: Spacing, levels: Levels, dtype: torch.dtype) -> Tensor:
    weight = _Dequantize.apply(position, scale, spacing, levels, dtype)  # type: ignore[no-untyped-call]
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
    grids = {n: _grid(q) for n, q in quantized.items()}
    positions = {n: (_positions(q, *grids[n]) + starts[n].float()).requires_grad_() for n, q in quantized.items()}
    scales = {n: spacing.scales.clone().requires_grad_() for n, (_, spacing, _) in grids.items()}
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
            weights = {n: _dequantize(positions[n], scales[n], *grids[n][1:], dtype) for n in names}
            loss(weights).backward()
        del weights
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step >= second_half:
            for n in names:
                averaged[n].lerp_(positions[n].detach(), 1 / (step - second_half + 1))
    return {n: _settled(quantized[n], averaged[n], scales[n].detach()) for n in names}


def _positions(quantized: QuantizedTensor, grid: Grid, spacing: Spacing, levels: Levels) -> Tensor:
    """Levels counted from their origin, float32 [out, in]: codes, where these are whole numbers."""
    zeros = spacing.zeros.unsqueeze(2)
    stands = values(grid, quantized.codes.unflatten(1, (zeros.shape[1], -1)), zeros)
    return stands.add_(levels.origin(zeros)).flatten(1)


def _settled(before: QuantizedTensor, position: Tensor, scales: Tensor) -> QuantizedTensor:
    grid, spacing, levels = _grid(before)
    stored = grid.store(scales, spacing.units)
    same_side = stored.sign() == spacing.scales.sign()  # a scale has no way through zero
    scales = torch.where(same_side & stored.isfinite(), stored, spacing.scales)
    codes = codes_of(grid, _nearest(position, spacing, levels), spacing.zeros.unsqueeze(2)).flatten(1)
    return with_codes(grid.restored(parameters_of(before), scales), codes)
