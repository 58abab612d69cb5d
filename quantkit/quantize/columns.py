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

from quantkit.products import accumulate_
from quantkit.quantize import kernels

BLOCK = 128  # columns that the loop itself goes over; the errors of a block reach the next ones in one product
WIDE = {"cpu": 128}
WIDE_ELSEWHERE = 1024  # on a GPU products with few terms would only move memory


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
    scales and zeros of each column; feedback: float32 [columns, columns], of which the upper triangle counts
    -> steps (codes minus zero points) and errors (base minus what the codes stand for), float32 [columns, out]
    """
    round_block = kernels.round_block if kernels.usable(target) else round_block_by_torch
    steps, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), BLOCK):
        part = slice(start, start + BLOCK)
        steps[part], errors[part] = round_block(
            target[part], base[part], scales, zeros, group[part], feedback[part, part].contiguous(), max_code
        )
        accumulate_(target[start + BLOCK :], feedback[part, start + BLOCK :], errors[part])
    return steps, errors


def round_block_by_torch(
    target: Tensor,
    base: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    feedback: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor]:
    """The loop itself, for one block, as `round_run`; the oracle of `kernels.round_block`, and what runs without it."""
    scale, low = scales[group], -zeros[group]
    high = low + max_code
    steps, errors = torch.empty_like(target), torch.empty_like(target)
    for j in range(len(target)):
        value = torch.addmv(target[j], errors[:j].T, feedback[:j, j]) if j else target[j]
        torch.clamp(torch.round(value / scale[j]), low[j], high[j], out=steps[j])
        torch.addcmul(base[j], steps[j], scale[j], value=-1, out=errors[j])
    return steps, errors
