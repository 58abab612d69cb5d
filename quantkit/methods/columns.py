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

from quantkit import kernels
from quantkit.grids.base import Lattice, stored_in_float16

BLOCK = 128  # columns that the loop itself goes over; the errors of a block reach the next ones in one product
WIDE = {"cpu": 128}
WIDE_ELSEWHERE = 1024  # on a GPU products with few terms would only move memory
NEAR = 16  # columns updated one at a time; later columns get the errors of these in one matmul


def wide(device: torch.device) -> int:
    """How many columns `round_run` takes at a time."""
    return WIDE.get(device.type, WIDE_ELSEWHERE)


def round_run(target: Tensor, base: Tensor, lattice: Lattice, group: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
    """Round columns in order; overwrites target.

    target, base: float32 [columns, out]; lattice: of [groups, out]; group: int64 [columns], the row of the lattice of
    each column; feedback: float32 [columns, columns], f_kj in row j; its lower triangle counts
    -> levels and errors (base minus what the levels stand for), float32 [columns, out]
    """
    levels, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), BLOCK):
        stop = min(start + BLOCK, len(target))
        part = slice(start, stop)
        _round_block(target[part], base[part], lattice, group[part], feedback[part, part], (levels[part], errors[part]))
        if stop < len(target):
            target[stop:].addmm_(feedback[stop:, part], errors[part])
    return levels, errors


def _round_block(
    target: Tensor, base: Tensor, lattice: Lattice, group: Tensor, feedback: Tensor, results: tuple[Tensor, Tensor]
) -> None:
    if kernels.usable(target) and lattice.levels.table is None:
        grid = lattice.scales, lattice.zeros, lattice.levels.max_code
        kernels.round_block(target, base, grid, group, feedback, results)
    else:
        round_block_by_torch(target, base, lattice, group, feedback, results)


def round_block_by_torch(
    target: Tensor, base: Tensor, lattice: Lattice, group: Tensor, feedback: Tensor, results: tuple[Tensor, Tensor]
) -> None:
    """The loop itself, for one block: see `round_run`; fills the results, levels and errors, overwrites target.

    It is the oracle of `kernels.round_block`, and what runs without it.
    """
    levels, errors = results
    scale, low = lattice.scales[group], -lattice.zeros[group]
    table = lattice.levels.table
    middles = None if table is None else lattice.levels.middles
    by_column = target, base, scale, low, low + lattice.levels.max_code, levels, errors
    later = feedback.tril(-1)  # what is moved by a column, without itself and those before it
    for start in range(0, len(target), NEAR):
        part = slice(start, min(start + NEAR, len(target)))
        near = target[part].addmm_(feedback[part, :start], errors[:start])
        columns = zip(*(matrix[part].unbind() for matrix in by_column), later[part, part].unbind(1), strict=True)
        for value, whole, size, least, most, level, error, moved in columns:
            torch.div(value, size, out=level)
            if table is None or middles is None:
                torch.clamp(level.round_(), least, most, out=level)
            else:
                level.copy_(table[torch.bucketize(level, middles)])
            torch.addcmul(whole, level, size, value=-1, out=error)
            near.add_(moved.unsqueeze(1) * error)  # not addr_, which rounds the last few rows in another way


def improve_group(
    x: Tensor, pull: Tensor, bend: Tensor, quadratic: tuple[Tensor, Tensor], lattice: Lattice, errors: Tensor
) -> None:
    """Move the scale of one group to the bottom of its parabola, as it can be stored, then round its columns once
    more; see `refine`. In place: x, the lattice's scale; overwritten: pull, bend.

    x: levels, pull: (H + ridge I)(W - Q), bend: (H + ridge I) x, float32 [columns, out]; quadratic: diag(H + ridge I),
    float32 [columns], and the feedback as in `round_run`; lattice: of [1, out]
    -> errors [columns, out], filled with what Q has lost by that
    """
    plain = lattice.levels.table is None and lattice.store is stored_in_float16
    if plain and kernels.usable(x) and len(x) <= kernels.WIDEST_IMPROVED:
        grid = lattice.scales[0], lattice.zeros[0], lattice.levels.max_code
        kernels.improve_group(x, pull, bend, quadratic, grid, errors)
    else:
        improve_group_by_torch(x, pull, bend, quadratic, lattice, errors)


def improve_group_by_torch(
    x: Tensor, pull: Tensor, bend: Tensor, quadratic: tuple[Tensor, Tensor], lattice: Lattice, errors: Tensor
) -> None:
    """The oracle of `kernels.improve_group`, and what runs without it."""
    (energy, feedback), scale = quadratic, lattice.scales[0]
    curvature = (x * bend).sum(0)
    wanted = scale + (x * pull).sum(0) / curvature.clamp(min=1e-30)
    stored = lattice.store(wanted, None if lattice.units is None else lattice.units[0])
    # A group whose levels are all zero, or whose scale would change its sign, keeps what it has.
    sound = (curvature > 0) & (stored.sign() == scale.sign()) & stored.isfinite()
    stored = torch.where(sound, stored, scale)
    lost = scale - stored
    scale.copy_(stored)
    stands = x * stored
    target = pull.addcmul_(bend, lost).div_(energy.unsqueeze(1)).add_(stands)
    torch.mul(x, lost, out=errors)
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    levels, rounded = round_run(target, stands, lattice, group, feedback)
    x.copy_(levels)
    errors += rounded
