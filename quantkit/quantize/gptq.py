# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): round column by column, and let the columns not yet rounded make up for each error.

GPTQ with the Gram matrix H is the same as LDLQ (QuIP, arXiv 2307.13304, theorem 6): with H = R R^T, R upper triangular,
and E = W - Q, the error tr(E H E^T) = ||E R||^2 falls apart by columns, and column j is best at

    v_j = w_j + sum over k < j of e_k R_kj / R_jj

rounded to the grid. So one Cholesky factorisation is all that is needed: if P reverses rows and columns and
P H P = U^T U, then R = P U^T P. The usual recipe inverts H and factorises once more, for the same codes.

Columns are taken in order of falling diag(H) (`act_order`) on grids fixed beforehand from the original columns
("static groups"), so that groups stay consecutive in the file and no g_idx is needed. Left out on purpose: grids
recomputed while columns are being updated, which act-order would scatter over the file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.products import accumulate_, accumulate_gram_
from quantkit.quantize.columns import round_run, wide
from quantkit.quantize.grid import search_grid
from quantkit.scheme import QuantizedTensor, Scheme

MAX_DAMP = 10.0
SOLVED_AT_ONCE = 1024  # rows of a triangular matrix; what lies beside them is left to products
REVERSED_AT_ONCE = 1 << 24  # numbers of a matrix


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix: solved once for all the linears that share it.

    order:    int64 [in], the order in which columns are rounded
    feedback: float32 [in, in], R_kj / R_jj in row j, lower triangular with a diagonal of ones, in that order
    pivots:   float32 [in], R_jj squared
    dead:     bool [in], columns whose input was always zero
    damp:     the damping that was used, as a share of mean(diag(H)): more than asked for if the factorisation failed
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
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
    # One matrix beside the Gram: for a 27648-wide input each is 2.85 GiB.
    while (upper := _cholesky(gram, order.flip(0), dead, used * mean)) is None:
        used = max(used * 10, 1e-4)
        if used > MAX_DAMP:
            raise NumericsError(f"the Gram matrix cannot be factorised, even with damping {MAX_DAMP}")
    feedback = _reverse_(upper)
    root = feedback.diagonal().clone()
    return Factor(order, feedback.div_(root.unsqueeze(1)), root.square(), dead, used)


def _cholesky(gram: Tensor, order: Tensor, dead: Tensor, ridge: Tensor) -> Tensor | None:
    """The upper triangular factor U of the damped Gram matrix U^T U with its columns in this order, or None.

    Block by block, so that nearly all of it is products. What is not factorised yet stands with its sign turned.
    """
    work = torch.empty_like(gram)
    for part in _blocks(len(work)):
        work[part] = gram[order[part]][:, order]
    work.diagonal().masked_fill_(dead[order], 1).add_(ridge)
    work.neg_()
    for part in _blocks(len(work)):
        corner, info = torch.linalg.cholesky_ex(-work[part, part], upper=True)
        if int(info) or not bool(torch.isfinite(corner.diagonal()).all()):
            return None
        beside, rest = work[part, part.stop :], work[part.stop :, part.stop :]
        work[part, part] = corner
        beside.copy_(torch.linalg.solve_triangular(corner.T, -beside, upper=False))
        accumulate_gram_(rest, beside)
    return work.triu_()


def _reverse_(matrix: Tensor) -> Tensor:
    """Reverse the order of rows and of columns, in place."""
    numbers = matrix.view(-1)
    for start in range(0, len(numbers) // 2, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, len(numbers) // 2)
        first, last = numbers[start:stop], numbers[len(numbers) - stop : len(numbers) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)
    return matrix


def times_inverse(matrix: Tensor, factor: Factor) -> Tensor:
    """matrix [rows, in] (X^T X + damping)^-1, with the factor at hand.

    With the drift of the inputs X from what they were in the original, X0, this is the least-squares weight that brings
    back what the drift has changed in the outputs: W' = W + W (X0 - X)^T X (X^T X)^-1. All of it would fit the
    calibration inputs more than others; `methods.Options.correct` says how much is taken.
    """
    wanted = matrix[:, factor.order].T.contiguous()
    # H = F^T diag(pivots) F
    for part in reversed(_blocks(len(wanted))):
        _solve_(factor.feedback[part, part].T, wanted[part], upper=True)
        accumulate_(wanted[: part.start], factor.feedback[part, : part.start], -wanted[part])
    wanted.div_(factor.pivots.unsqueeze(1))
    for part in _blocks(len(wanted)):
        _solve_(factor.feedback[part, part], wanted[part], upper=False)
        accumulate_(wanted[part.stop :], factor.feedback[part.stop :, part].T, -wanted[part])
    result = torch.empty_like(matrix)
    result[:, factor.order] = wanted.T
    return result


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + SOLVED_AT_ONCE, count)) for start in range(0, count, SOLVED_AT_ONCE)]


def _solve_(triangle: Tensor, wanted: Tensor, *, upper: bool) -> None:
    wanted.copy_(torch.linalg.solve_triangular(triangle, wanted, upper=upper, unitriangular=True))


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
    group = factor.order // (weight.shape[1] // scales.shape[1])
    per_group = scales.float().T.contiguous(), zeros.float().T.contiguous()
    codes = solve(weight.T[factor.order].contiguous(), *per_group, group, factor.feedback, scheme.max_code)
    natural = torch.empty_like(codes)
    natural[factor.order] = codes
    return QuantizedTensor(natural.T.contiguous(), scales, zeros, scheme)


def solve(weight: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, feedback: Tensor, max_code: int) -> Tensor:
    """The columns of a weight as rows, float32 [in, out] in rounding order -> codes, uint8 [in, out].

    scales, zeros: float32 [groups, out]; group: int64 [in], the group of each column; feedback: as in `Factor`.
    """
    work, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(weight), wide(weight.device)):
        stop = min(start + wide(weight.device), len(weight))
        part = slice(start, stop)
        steps, errors = round_run(work[part], weight[part], scales, zeros, group[part], feedback[part, part], max_code)
        codes[part] = steps.add_(zeros[group[part]]).to(torch.uint8)
        accumulate_(work[stop:], feedback[stop:, part].T, errors)
    return codes
