# SPDX-License-Identifier: Apache-2.0
"""Columns rounded one after the other, each making up for the errors of those before it.

GPTQ and coordinate descent are the same loop. Column j has a value it would best take, t_j, were all the columns before
it already right; they are not, and what is wrong with them moves it by the feedback f:

    v_j = t_j + sum over k < j of e_k f_kj        q_j = v_j rounded to the grid        e_j = b_j - q_j

with b_j what the error is counted from. Here a matrix of weights stands with its columns as rows, [in, out], so that
each step reads and writes contiguous memory. `WIDE` columns at a time see each other's errors at once; the rest of the
matrix hears of them in one large product, which is where the time goes.
"""

import torch
from torch import Tensor

from quantkit.methods import kernels
from quantkit.methods.grid import nearest_float16

BLOCK = 128  # columns that the loop itself goes over; the errors of a block reach the next ones in one product
WIDE = {"cpu": 128}
WIDE_ELSEWHERE = 1024  # on a GPU products with few terms would only move memory
TOLD = 16  # columns that torch tells of each error as it is made; those behind them hear of all in one product


def wide(device: torch.device) -> int:
    """How many columns `round_run` takes at a time."""
    return WIDE.get(device.type, WIDE_ELSEWHERE)


def round_run(
    target: Tensor,
    base: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    feedback: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor]:
    """Round columns in order; overwrites target.

    target, base: float32 [columns, out]; scales, zeros: float32 [groups, out]; group: int64 [columns], the row of
    scales and zeros of each column; feedback: float32 [columns, columns], f_kj in row j; its lower triangle counts
    -> steps (codes minus zero points) and errors (base minus what the codes stand for), float32 [columns, out]
    """
    round_block = kernels.round_block if kernels.usable(target) else round_block_by_torch
    steps, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), BLOCK):
        stop = min(start + BLOCK, len(target))
        part = slice(start, stop)
        round_block(
            target[part],
            base[part],
            scales,
            zeros,
            group[part],
            feedback[part, part],
            max_code,
            steps[part],
            errors[part],
        )
        if stop < len(target):
            target[stop:].addmm_(feedback[stop:, part], errors[part])
    return steps, errors


def round_block_by_torch(
    target: Tensor,
    base: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    feedback: Tensor,
    max_code: int,
    steps: Tensor,
    errors: Tensor,
) -> None:
    """The loop itself, for one block: see `round_run`; fills steps and errors, overwrites target.

    It is the oracle of `kernels.round_block`, and what runs without it.
    """
    scale, low = scales[group], -zeros[group]
    by_column = target, base, scale, low, low + max_code, steps, errors
    later = feedback.tril(-1)  # what is moved by a column, without itself and those before it
    for start in range(0, len(target), TOLD):
        part = slice(start, min(start + TOLD, len(target)))
        told = target[part].addmm_(feedback[part, :start], errors[:start])
        columns = zip(*(matrix[part].unbind() for matrix in by_column), later[part, part].unbind(1), strict=True)
        for value, whole, size, least, most, step, error, moved in columns:
            torch.div(value, size, out=step)
            torch.clamp(step.round_(), least, most, out=step)
            torch.addcmul(whole, step, size, value=-1, out=error)
            told.add_(moved.unsqueeze(1) * error)  # not addr_, which rounds the last few rows in another way


def improve_group(
    x: Tensor,
    pull: Tensor,
    bend: Tensor,
    energy: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    errors: Tensor,
) -> None:
    """Move the scale of one group to the bottom of its parabola, as float16 holds it, then round its columns once
    more; see `refine`. In place: x, scale; overwritten: pull, bend.

    x: steps, pull: (H + ridge I)(W - Q), bend: (H + ridge I) x, float32 [columns, out]; energy: diag(H + ridge I),
    float32 [columns]; feedback: as in `round_run`; scale, zero: float32 [out]
    -> errors [columns, out], filled with what Q has lost by that
    """
    one_launch = kernels.usable(x) and len(x) <= kernels.WIDEST_IMPROVED
    improve = kernels.improve_group if one_launch else improve_group_by_torch
    improve(x, pull, bend, energy, feedback, scale, zero, max_code, errors)


def improve_group_by_torch(
    x: Tensor,
    pull: Tensor,
    bend: Tensor,
    energy: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    errors: Tensor,
) -> None:
    """The oracle of `kernels.improve_group`, and what runs without it."""
    curvature = (x * bend).sum(0)
    wanted = scale + (x * pull).sum(0) / curvature.clamp(min=1e-30)
    stored = nearest_float16(wanted).float()
    # A group whose codes are all at zero, or whose scale would change its sign, keeps what it has.
    sound = (curvature > 0) & (stored.sign() == scale.sign()) & stored.isfinite()
    stored = torch.where(sound, stored, scale)
    lost = scale - stored
    scale.copy_(stored)
    stands = x * stored
    target = pull.addcmul_(bend, lost).div_(energy.unsqueeze(1)).add_(stands)
    torch.mul(x, lost, out=errors)
    grid = scale.unsqueeze(0), zero.unsqueeze(0)
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    steps, rounded = round_run(target, stands, *grid, group, feedback, max_code)
    x.copy_(steps)
    errors += rounded
