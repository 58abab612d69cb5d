# SPDX-License-Identifier: Apache-2.0
"""What can still be won after rounding, with codes and scales where they are: two descents on the same error

    tr((W - Q) H (W - Q)^T)

Coordinate descent (QuantEase, arXiv 2309.01885): given all other columns, the best value of column j is
q_j + [(W - Q) H]_j / H_jj, rounded to the grid. GPTQ rounds each column once, before the later ones are known; this
goes over them again, knowing all.

Scale refit (arXiv 2602.02126): given the codes, the error is a parabola in the scale of each group,

    ds_g = x_g [(W - Q) H]_g / (x_g H_gg x_g^T)          x = codes minus zero points

and the scale is moved to the bottom of it, in float16 as it will be stored. Neither step can raise the error, but for
the rounding of scales. Both keep R = (W - Q) H up to date, which is what makes them cheap.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.quantize.gptq import BLOCK
from quantkit.quantize.grid import to_float16
from quantkit.scheme import QuantizedTensor, expand

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
    weight = weight.float().masked_fill(diagonal <= 0, 0)  # dead columns stay at zero, as GPTQ left them
    columns = quantized.in_features // quantized.scales.shape[1]
    zeros = expand(quantized.zeros.float(), columns)
    steps = quantized.codes.float() - zeros  # codes minus zero points, [out, in]
    scales = quantized.scales.float()
    difference = weight - steps * expand(scales, columns)
    residual = torch.addmm(difference, difference, gram, beta=ridge)  # (W - Q)(H + ridge I)
    for _ in range(rounds):
        _refit(steps, scales, residual, gram, ridge)
        scale = expand(scales, columns)
        for _ in range(SWEEPS):
            _descend(steps, scale, zeros, residual, gram, order, ridge, quantized.scheme.max_code)
    _refit(steps, scales, residual, gram, ridge)
    return replace(quantized, codes=(steps + zeros).to(torch.uint8), scales=scales.to(torch.float16))


def _refit(steps: Tensor, scales: Tensor, residual: Tensor, gram: Tensor, ridge: float) -> None:
    """Move each group's scale to the bottom of its parabola, group after group; in place."""
    groups = scales.shape[1]
    columns = steps.shape[1] // groups
    for group in range(groups):
        part = slice(group * columns, (group + 1) * columns)
        x = steps[:, part]
        slope = (x * residual[:, part]).sum(1)
        curvature = torch.addmm(x, x, gram[part, part], beta=ridge).mul_(x).sum(1)
        wanted = scales[:, group] + slope / curvature.clamp(min=1e-30)
        # A group whose codes are all at zero, or whose scale would change its sign, keeps what it has.
        sound = (curvature > 0) & (wanted.sign() == scales[:, group].sign())
        stored = torch.where(sound, to_float16(torch.where(sound, wanted, scales[:, group])).float(), scales[:, group])
        change = (stored - scales[:, group]).unsqueeze(1) * x
        scales[:, group] = stored
        residual.addmm_(change, gram[part], alpha=-1)
        residual[:, part].sub_(change, alpha=ridge)


def _descend(
    steps: Tensor,
    scale: Tensor,
    zeros: Tensor,
    residual: Tensor,
    gram: Tensor,
    order: Tensor,
    ridge: float,
    max_code: int,
) -> None:
    """Round every column once more, in order, given all the others; in place."""
    for block in order.split(BLOCK):
        # Columns as rows: the loop then reads and writes contiguous memory.
        code = steps[:, block].T.contiguous()  # [columns, out]
        block_scale, low = scale[:, block].T.contiguous(), -zeros[:, block].T
        high = low + max_code
        pull = residual[:, block].T.contiguous()
        local = gram[block][:, block]
        local.diagonal().add_(ridge)
        before = code.clone()
        for j in range(len(block)):
            wanted = code[j] + pull[j] / (local[j, j] * block_scale[j])
            moved = torch.round(wanted).clamp_(low[j], high[j])
            pull.addr_(local[:, j], (moved - code[j]) * block_scale[j], alpha=-1)
            code[j] = moved
        change = ((code - before) * block_scale).T
        steps[:, block] = code.T
        residual.addmm_(change, gram[block], alpha=-1)
        residual[:, block] -= ridge * change
