# SPDX-License-Identifier: Apache-2.0
"""What can still be won after rounding, with codes and scales where they are: two descents on the same error

    tr((W - Q) H (W - Q)^T)

Scale refit (arXiv 2602.02126): given the codes, the error is a parabola in the scale of each group,

    ds_g = x_g [(W - Q) H]_g / (x_g H_gg x_g^T)          x = levels: codes minus zero points

and the scale is moved to the bottom of it, as the grid will store it.

Coordinate descent (QuantEase, arXiv 2309.01885): given all other columns, the best value of column j is
q_j + [(W - Q) H]_j / H_jj, rounded to the grid. GPTQ rounds each column once, before the later ones are known; this
goes over them again, knowing all.

Group after group has its scale refitted and its columns rounded once more. Neither step can raise the error, but for
the rounding of scales. Both need R = (W - Q) H, which is kept up to date: a large product for what has changed in many
columns, and that is where the time goes. A GPU makes it of single bfloat16 products, as a step that is taken for a
residual 2^-9 off is still one downhill (`LOG.md` has what it costs).
"""

import torch
from torch import Tensor

from quantkit.grids.base import Lattice, parameters_of
from quantkit.grids.registry import columns_of, dequantize, from_columns
from quantkit.hardware.matmul import accumulate_, batched_product, fast_16bit, product
from quantkit.methods.columns import improve_group, wide
from quantkit.scheme import QuantizedTensor
from quantkit.stats import output_error

SMALLEST_DAMP = 1e-6  # a column without any energy must still have one best value


def refine(
    weight: Tensor, quantized: QuantizedTensor, gram: Tensor, *, damp: float, rounds: int
) -> tuple[QuantizedTensor, Tensor]:
    """Lower the error of a rounding of weight [out, in] under the Gram matrix [in, in].

    damp: as in `gptq.factorize`, keeps columns with hardly any energy from wandering; rounds: how often all groups
    are gone over
    -> the rounding, and what is left of its error by row, float32 [out]
    """
    if rounds == 0:
        return quantized, output_error(dequantize(quantized) - weight, gram, exact=False)
    diagonal = gram.diagonal()
    ridge = float(max(damp, SMALLEST_DAMP) * diagonal.mean().clamp(min=1e-30))
    # Columns as rows, [in, out], so that a column is contiguous; scales and zeros [groups, out] likewise.
    dead = (diagonal <= 0).unsqueeze(1)  # these stay at zero, as GPTQ left them
    lattice, levels, lows = columns_of(quantized)
    columns = len(levels) // len(lattice.scales)
    group = torch.arange(len(levels), device=gram.device) // columns

    def difference() -> Tensor:
        """(W - Q)^T: nothing in dead columns."""
        wanted = weight.float().T.clone(memory_format=torch.contiguous_format)
        if lows is not None:
            wanted += lows
        return wanted.addcmul_(levels, lattice.scales[group], value=-1).masked_fill_(dead, 0)

    rough = gram.bfloat16() if fast_16bit(gram) else gram  # once for all products
    lost = difference()
    residual = product(rough, lost.to(rough.dtype)).add_(lost, alpha=ridge)  # (H + ridge I)(W - Q)
    del lost
    at_once = max(1, wide(gram.device) // columns)  # groups that hear of each other's errors at once
    for _ in range(rounds):
        for first in range(0, len(lattice.scales), at_once):
            some = slice(first, min(first + at_once, len(lattice.scales)))
            span = slice(first * columns, some.stop * columns)
            grams = gram[span, span], rough[span, span]
            errors = _go_over(levels[span], lattice.part(some), residual[span], grams, ridge)
            accumulate_(residual, rough[span], errors)
            residual[span].add_(errors, alpha=ridge)
    lost = difference()
    # Summed along rows in memory, so that how many there are does not decide the last bits.
    error = residual.sub_(lost, alpha=ridge).mul_(lost).T.contiguous().sum(1)
    del residual, lost
    return from_columns(parameters_of(quantized), lattice, levels), error


def _go_over(x: Tensor, lattice: Lattice, residual: Tensor, grams: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """Refit and round groups of columns in order; levels and scales in place.

    x: levels, residual: [columns, out]; lattice: of [groups, out]; grams: twice [columns, columns], the second in the
    type of the products
    -> errors: what Q has lost by that, [columns, out] in that type
    """
    gram, rough = grams
    columns = len(x) // len(lattice.scales)
    pull, energy = residual.clone(), gram.diagonal() + ridge
    feedback = gram / energy.unsqueeze(1)  # of a symmetric matrix, so that row j holds what moves column j
    bend = _within_groups(rough, x, ridge, columns)
    errors = torch.empty_like(pull, dtype=rough.dtype)
    for group in range(len(lattice.scales)):
        part = slice(group * columns, (group + 1) * columns)
        quadratic = energy[part], feedback[part, part]
        improve_group(x[part], pull[part], bend[group], quadratic, lattice.part(slice(group, group + 1)), errors[part])
        if part.stop < len(x):
            accumulate_(pull[part.stop :], rough[part, part.stop :], errors[part])
    return errors


def _within_groups(rough: Tensor, x: Tensor, ridge: float, columns: int) -> Tensor:
    """(H_gg + ridge I) x_g for each group of `columns` columns of x [columns, out]: [groups, columns, out]."""
    blocks = torch.stack([rough[i : i + columns, i : i + columns] for i in range(0, len(rough), columns)])
    grouped = x.unflatten(0, (-1, columns))
    return batched_product(blocks, grouped.to(rough.dtype)).add_(grouped, alpha=ridge)
