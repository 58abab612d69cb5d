# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): round column by column, and let the columns not yet rounded make up for each error.

With the Gram matrix H and the upper triangular U of H^-1 = U^T U, column j is rounded to q_j and the rest updated:

    e = (w_j - q_j) / U_jj            W[:, j:] -= e U[j, j:]

U comes from one Cholesky factorisation of H with rows and columns reversed: if PHP = L L^T then H = R R^T with the
upper triangular R = PLP, and U = R^-1. That saves the inverse and the second factorisation of the usual recipe.

Columns are taken in order of falling diag(H) (`act_order`) on grids fixed beforehand from the original columns
("static groups"), so that groups stay consecutive in the file and no g_idx is needed. Left out on purpose: grids
recomputed while columns are being updated, which act-order would scatter over the file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.quantize.grid import search_grid
from quantkit.scheme import QuantizedTensor, Scheme, expand

BLOCK = 128
MAX_DAMP = 10.0


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix: solved once for all the linears that share it.

    order:    int64 [in], the order in which columns are rounded
    inverse:  float32 [in, in], the upper triangular U, in that order
    dead:     bool [in], columns whose input was always zero
    damp:     the damping that was used, as a share of mean(diag(H)): more than asked for if the factorisation failed
    """

    order: Tensor
    inverse: Tensor
    dead: Tensor
    damp: float


def factorize(gram: Tensor, *, damp: float = 0.01, act_order: bool = True) -> Factor:
    """Factorise the Gram matrix [in, in], raising the damping tenfold as long as that fails.

    Raises:
        NumericsError: the matrix is not finite, or no damping up to 10 makes it positive definite.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise NumericsError("the Gram matrix is not finite")
    dead = diagonal <= 0
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(len(gram), device=gram.device)
    )
    mean = diagonal.mean().clamp(min=1e-30)
    used = damp
    # Two matrices at a time beside the Gram: for a 27648-wide input each one is 2.85 GiB.
    while (lower := _cholesky(gram, order.flip(0), dead, used * mean)) is None:
        used = max(used * 10, 1e-4)
        if used > MAX_DAMP:
            raise NumericsError(f"the Gram matrix cannot be factorised, even with damping {MAX_DAMP}")
    upper = lower.flip(0, 1)
    del lower
    inverse = torch.eye(len(gram), device=gram.device)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return Factor(order, inverse, dead, used)


def _cholesky(gram: Tensor, order: Tensor, dead: Tensor, ridge: Tensor) -> Tensor | None:
    """The lower triangular factor of the damped Gram matrix with its columns in this order, or None."""
    damped = gram[order][:, order]
    damped.diagonal().masked_fill_(dead[order], 1).add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped)
    return lower if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()) else None


def quantize(
    weight: Tensor,
    scheme: Scheme,
    factor: Factor,
    *,
    energy: Tensor,
    min_zero: int = 0,
    grid: tuple[Tensor, Tensor] | None = None,
) -> QuantizedTensor:
    """Quantize weight [out, in], spreading each column's error over the columns still to come; dead columns become 0.

    energy [in] is diag(H), the weight of each column in the search for the grid; `grid` gives scales and zeros
    instead of searching.
    """
    weight = weight.float().masked_fill(factor.dead, 0)  # before the grid: what is dead needs no range
    scales, zeros = grid or search_grid(weight, scheme, energy, min_zero)
    columns = weight.shape[1] // scales.shape[1]
    order = factor.order
    scale = expand(scales.float(), columns)[:, order]
    zero = expand(zeros.float(), columns)[:, order]
    codes = solve(weight[:, order], scale, zero, factor.inverse, scheme.max_code)
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return QuantizedTensor(natural, scales, zeros, scheme)


def solve(work: Tensor, scale: Tensor, zero: Tensor, inverse: Tensor, max_code: int) -> Tensor:
    """The column loop, in blocks; overwrites work.

    work, scale, zero: float32 [out, in] in rounding order; inverse: U [in, in] -> codes uint8 [out, in].
    """
    out_features, in_features = work.shape
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=work.device)
    for start in range(0, in_features, BLOCK):
        end = min(start + BLOCK, in_features)
        # Columns as rows: the loop then reads and writes contiguous memory.
        block = work[:, start:end].T.contiguous()  # [columns, out]
        block_scale, block_zero = scale[:, start:end].T.contiguous(), zero[:, start:end].T.contiguous()
        local = inverse[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            shifted = torch.round(block[j] / block_scale[j]).add_(block_zero[j]).clamp_(0, max_code)
            codes[:, start + j] = shifted.to(torch.uint8)
            error = (block[j] - (shifted - block_zero[j]) * block_scale[j]) / local[j, j]
            block[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
            errors[j] = error
        work[:, end:].addmm_(errors.T, inverse[start:end, end:], alpha=-1)
    return codes
