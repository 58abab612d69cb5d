# SPDX-License-Identifier: Apache-2.0
"""What can still be won after rounding, with codes and scales where they are: two descents on the same error

    tr((W - Q) H (W - Q)^T)

Coordinate descent (QuantEase, arXiv 2309.01885): given all other columns, the best value of column j is
q_j + [(W - Q) H]_j / H_jj, rounded to the grid. GPTQ rounds each column once, before the later ones are known; this
goes over them again, knowing all.

Scale refit (arXiv 2602.02126): given the codes, the error is a parabola in the scale of each group,

    ds_g = x_g [(W - Q) H]_g / (x_g H_gg x_g^T)          x = codes minus zero points

and the scale is moved to the bottom of it, in float16 as it will be stored. Neither step can raise the error, but for
the rounding of scales. Both keep R = (W - Q) H up to date, which is what makes them cheap; a GPU does so in single
bfloat16 products, as a step that is taken for a residual 2^-9 off is still one downhill (`LOG.md` has what it costs).
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.products import accumulate_, product
from quantkit.quantize.columns import refit_group, round_run, wide
from quantkit.scheme import QuantizedTensor

SWEEPS = 2  # coordinate descents between two refits
SMALLEST_DAMP = 1e-6  # a column without any energy must still have one best value


def refine(
    weight: Tensor, quantized: QuantizedTensor, gram: Tensor, order: Tensor, *, damp: float, rounds: int
) -> QuantizedTensor:
    """Lower the error of a rounding of weight [out, in] under the Gram matrix [in, in].

    order: int64 [in], the order in which columns are revisited; damp: as in `gptq.factorize`, keeps columns with
    hardly any energy from wandering; rounds: refit and sweep this often, and refit once more.
    """
    if rounds == 0:
        return quantized
    diagonal = gram.diagonal()
    ridge = float(max(damp, SMALLEST_DAMP) * diagonal.mean().clamp(min=1e-30))
    # Columns as rows, [in, out], so that a column is contiguous; scales and zeros [groups, out] likewise.
    weight = weight.float().masked_fill(diagonal <= 0, 0)  # dead columns stay at zero, as GPTQ left them
    zeros = quantized.zeros.float().T.contiguous()
    scales = quantized.scales.float().T.contiguous()
    columns = quantized.in_features // len(scales)
    group = torch.arange(quantized.in_features, device=gram.device) // columns
    steps = quantized.codes.T.contiguous().float().sub_(zeros[group])  # codes minus zero points
    difference = weight.T.contiguous().addcmul_(steps, scales[group], value=-1)
    residual = product(gram, difference).add_(difference, alpha=ridge)  # (H + ridge I)(W - Q)
    del weight, difference
    for _ in range(rounds):
        _refit(steps, scales, residual, gram, ridge)
        for _ in range(SWEEPS):
            _descend(steps, scales, zeros, group, residual, gram, order, ridge, quantized.scheme.max_code)
    _refit(steps, scales, residual, gram, ridge)
    codes = steps.add_(zeros[group]).to(torch.uint8).T.contiguous()
    return replace(quantized, codes=codes, scales=scales.T.to(torch.float16).contiguous())


def _refit(steps: Tensor, scales: Tensor, residual: Tensor, gram: Tensor, ridge: float) -> None:
    """Move each group's scale to the bottom of its parabola, group after group; in place."""
    columns = len(steps) // len(scales)
    at_once = max(1, wide(steps.device) // columns)  # groups whose residuals are kept up to date by themselves
    for first in range(0, len(scales), at_once):
        last = min(first + at_once, len(scales))
        start, stop = first * columns, last * columns
        local, pull, x = gram[start:stop, start:stop], residual[start:stop].clone(), steps[start:stop]
        curvature = _curvature(local, x, ridge, columns)
        errors = torch.empty_like(pull)
        for group in range(first, last):
            part = slice(group * columns - start, (group + 1) * columns - start)
            refit_group(x[part], pull[part], curvature[group - first], scales[group], errors[part])
            if group + 1 < last:
                pull[part.stop :].addmm_(local[part, part.stop :].T, errors[part])
        accumulate_(residual, gram[start:stop], errors, exact=False)
        residual[start:stop].add_(errors, alpha=ridge)


def _curvature(local: Tensor, x: Tensor, ridge: float, columns: int) -> Tensor:
    """x_g^T (H_gg + ridge I) x_g for each group of `columns` columns of x [columns, out]: [groups, out]."""
    blocks = torch.stack([local[i : i + columns, i : i + columns] for i in range(0, len(local), columns)])
    grouped = x.unflatten(0, (-1, columns))
    return torch.baddbmm(grouped, blocks, grouped, beta=ridge).mul_(grouped).sum(1)


def _descend(
    steps: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    residual: Tensor,
    gram: Tensor,
    order: Tensor,
    ridge: float,
    max_code: int,
) -> None:
    """Round every column once more, in order, given all the others; in place."""
    for block in order.split(wide(order.device)):
        rows = gram[block]
        local = rows[:, block]
        local.diagonal().add_(ridge)
        energy = local.diagonal()
        stands = steps[block] * scales[group[block]]  # what the codes stand for now
        target = torch.addcdiv(stands, residual[block], energy.unsqueeze(1))
        feedback = local / energy.unsqueeze(1)  # of a symmetric matrix, so that row j holds what moves column j
        steps[block], errors = round_run(target, stands, scales, zeros, group[block], feedback, max_code)
        accumulate_(residual, rows, errors, exact=False)
        residual[block] += ridge * errors
