# SPDX-License-Identifier: Apache-2.0
"""What can still be won after rounding, with codes and scales where they are: two descents on the same error

    tr((W - Q) H (W - Q)^T)

Scale refit (arXiv 2602.02126): given the codes, the error is a parabola in the scale of each group,

    ds_g = x_g [(W - Q) H]_g / (x_g H_gg x_g^T)          x = codes minus zero points

and the scale is moved to the bottom of it, in float16 as it will be stored.

Coordinate descent (QuantEase, arXiv 2309.01885): given all other columns, the best value of column j is
q_j + [(W - Q) H]_j / H_jj, rounded to the grid. GPTQ rounds each column once, before the later ones are known; this
goes over them again, knowing all.

Group after group has its scale refitted and its columns rounded once more. Neither step can raise the error, but for
the rounding of scales. Both need R = (W - Q) H, which is kept up to date: a large product for what has changed in many
columns, and that is where the time goes. A GPU makes it of single bfloat16 products, as a step that is taken for a
residual 2^-9 off is still one downhill (`LOG.md` has what it costs).
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.hardware.matmul import accumulate_, batched_product, fast_16bit, product
from quantkit.methods.columns import improve_group, wide
from quantkit.scheme import QuantizedTensor, dequantize
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
    zeros = quantized.zeros.float().T.contiguous()
    scales = quantized.scales.float().T.contiguous()
    columns = quantized.in_features // len(scales)
    group = torch.arange(quantized.in_features, device=gram.device) // columns
    steps = quantized.codes.T.contiguous().float().sub_(zeros[group])  # codes minus zero points
    difference = _difference(weight, steps, scales[group], dead)
    rough = gram.bfloat16() if fast_16bit(gram) else gram  # once for all products
    residual = product(rough, difference.to(rough.dtype)).add_(difference, alpha=ridge)  # (H + ridge I)(W - Q)
    del difference
    at_once = max(1, wide(gram.device) // columns)  # groups that hear of each other's errors at once
    for _ in range(rounds):
        for first in range(0, len(scales), at_once):
            some = slice(first, min(first + at_once, len(scales)))
            span = slice(first * columns, some.stop * columns)
            errors = _go_over(
                steps[span],
                scales[some],
                zeros[some],
                residual[span],
                gram[span, span],
                rough[span, span],
                ridge,
                quantized.scheme.max_code,
            )
            accumulate_(residual, rough[span], errors)
            residual[span].add_(errors, alpha=ridge)
    difference = _difference(weight, steps, scales[group], dead)
    # Summed along rows in memory, so that how many there are does not decide the last bits.
    error = residual.sub_(difference, alpha=ridge).mul_(difference).T.contiguous().sum(1)
    del residual, difference
    codes = steps.add_(zeros[group]).to(torch.uint8).T.contiguous()
    return replace(quantized, codes=codes, scales=scales.T.to(torch.float16).contiguous()), error


def _difference(weight: Tensor, steps: Tensor, scales: Tensor, dead: Tensor) -> Tensor:
    """(W - Q)^T: what weight [out, in] is above steps times scales, both [in, out]; nothing in dead columns [in, 1]."""
    return weight.float().T.contiguous().addcmul_(steps, scales, value=-1).masked_fill_(dead, 0)


def _go_over(
    x: Tensor,
    scales: Tensor,
    zeros: Tensor,
    residual: Tensor,
    gram: Tensor,
    rough: Tensor,
    ridge: float,
    max_code: int,
) -> Tensor:
    """Refit and round groups of columns in order; steps and scales in place.

    x: steps, residual: [columns, out]; scales, zeros: [groups, out]; gram, rough: [columns, columns], the latter in the
    type of the products
    -> errors: what Q has lost by that, [columns, out] in that type
    """
    columns = len(x) // len(scales)
    pull, energy = residual.clone(), gram.diagonal() + ridge
    feedback = gram / energy.unsqueeze(1)  # of a symmetric matrix, so that row j holds what moves column j
    bend = _within_groups(rough, x, ridge, columns)
    errors = torch.empty_like(pull, dtype=rough.dtype)
    for group in range(len(scales)):
        part = slice(group * columns, (group + 1) * columns)
        improve_group(
            x[part],
            pull[part],
            bend[group],
            energy[part],
            feedback[part, part],
            scales[group],
            zeros[group],
            max_code,
            errors[part],
        )
        if part.stop < len(x):
            accumulate_(pull[part.stop :], rough[part, part.stop :], errors[part])
    return errors


def _within_groups(rough: Tensor, x: Tensor, ridge: float, columns: int) -> Tensor:
    """(H_gg + ridge I) x_g for each group of `columns` columns of x [columns, out]: [groups, columns, out]."""
    blocks = torch.stack([rough[i : i + columns, i : i + columns] for i in range(0, len(rough), columns)])
    grouped = x.unflatten(0, (-1, columns))
    return batched_product(blocks, grouped.to(rough.dtype)).add_(grouped, alpha=ridge)
