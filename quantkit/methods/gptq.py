# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): round column by column, and let the columns not yet rounded make up for each error.

GPTQ with the Gram matrix H is the same as LDLQ (QuIP, arXiv 2307.13304, theorem 6): with H = R R^T, R upper triangular,
and E = W - Q, the error tr(E H E^T) = ||E R||^2 falls apart by columns, and column j is best at

    v_j = w_j + sum over k < j of e_k R_kj / R_jj

rounded to the grid. So one Cholesky factorisation is all that is needed, one that begins at the last column. The usual
recipe inverts H and factorises once more, for the same codes.

Columns are taken in order of falling diag(H) (`act_order`) on grids fixed beforehand from the original columns
("static groups"), so that groups stay consecutive in the file and no g_idx is needed. Left out on purpose: grids
recomputed while columns are being updated, which act-order would scatter over the file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.grids.base import Lattice, Parameters
from quantkit.grids.registry import from_columns, lattice_of, search
from quantkit.hardware.matmul import accumulate_, accumulate_gram_, linear, product
from quantkit.methods.columns import round_run, wide
from quantkit.scheme import QuantizedTensor, Scheme

MAX_DAMP = 10.0
BLOCK = {"cpu": 256}  # rows of a triangular matrix that are inverted; what lies beside them is left to products
BLOCK_ELSEWHERE = 1024


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix: solved once for all the linears that share it.

    order:    int64 [in], the order in which columns are rounded
    feedback: float32 [in, in], R_kj / R_jj in row j, lower triangular with a diagonal of ones, in that order
    pivots:   float32 [in], R_jj squared
    inverses: of the blocks on the diagonal of `feedback`, see `_blocks`
    dead:     bool [in], columns whose input was always zero
    damp:     the damping that was used, as a share of mean(diag(H)): more than asked for if the factorisation failed
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
    inverses: tuple[Tensor, ...]
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
    while (found := _cholesky(gram, order, dead, used * mean)) is None:
        used = max(used * 10, 1e-4)
        if used > MAX_DAMP:
            raise NumericsError(f"the Gram matrix cannot be factorised, even with damping {MAX_DAMP}")
    feedback, inverses = found
    root = feedback.diagonal().clone()
    for part, inverse in zip(_blocks(feedback), inverses, strict=True):
        inverse.mul_(root[part])
    return Factor(order, feedback.div_(root.unsqueeze(1)), root.square(), inverses, dead, used)


def _cholesky(gram: Tensor, order: Tensor, dead: Tensor, ridge: Tensor) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """R^T, lower triangular, of the damped Gram matrix R R^T with its columns in this order, and the inverses of the
    blocks on its diagonal; or None.

    From the last block to the first, so that nearly all of it is products. What is not factorised yet stands in the
    upper triangle with its sign turned.
    """
    work = torch.empty_like(gram)
    blocks = _blocks(work)
    for part in blocks:
        torch.neg(gram[order[part]][:, order[part.start :]], out=work[part, part.start :])
    work.diagonal().masked_fill_(dead[order], -1).sub_(ridge)
    inverses, failures = [], []
    for part in reversed(blocks):
        # R is upper triangular: turned about, the corner is the product of a lower triangular matrix and its transpose
        turned, info = torch.linalg.cholesky_ex(-work[part, part].flip(0, 1))
        failures.append(info)
        corner = turned.flip(0, 1).T
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=gram.device), upper=False)
        beside = linear(inverse.T, work[: part.start, part]).neg_()
        work[part, part], work[part, : part.start] = corner, beside
        accumulate_gram_(work[: part.start, : part.start], beside)
        inverses.append(inverse)
    # Looked at last, so that a GPU is waited for once.
    if bool(torch.stack(failures).any()) or not bool(torch.isfinite(work.diagonal()).all()):
        return None
    return work.tril_(), tuple(reversed(inverses))


def times_inverse(matrix: Tensor, factor: Factor) -> Tensor:
    """matrix [rows, in] (X^T X + damping)^-1, with the factor at hand.

    With the drift of the inputs X from what they were in the original, X0, this is the least-squares weight that brings
    back what the drift has changed in the outputs: W' = W + W (X0 - X)^T X (X^T X)^-1. All of it would fit the
    calibration inputs more than others; `methods.Options.correct` says how much is taken.
    """
    wanted = matrix.T.contiguous()[factor.order]  # whole rows are gathered fastest
    blocks = list(zip(_blocks(wanted), factor.inverses, strict=True))
    # H = F^T diag(pivots) F
    for part, inverse in reversed(blocks):
        wanted[part] = product(inverse.T, wanted[part])
        accumulate_(wanted[: part.start], factor.feedback[part, : part.start], -wanted[part])
    wanted.div_(factor.pivots.unsqueeze(1))
    for part, inverse in blocks:
        wanted[part] = product(inverse, wanted[part])
        accumulate_(wanted[part.stop :], factor.feedback[part.stop :, part].T, -wanted[part])
    wanted = wanted[torch.argsort(factor.order)]
    return wanted.T.contiguous()


def _blocks(rows: Tensor) -> list[slice]:
    count, at_once = len(rows), BLOCK.get(rows.device.type, BLOCK_ELSEWHERE)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def quantize(
    weight: Tensor,
    scheme: Scheme,
    factor: Factor,
    *,
    energy: Tensor,
    min_zero: int = 0,
    parameters: Parameters | None = None,
) -> QuantizedTensor:
    """Quantize weight [out, in], spreading each column's error over the columns still to come; dead columns become 0.

    energy [in] is diag(H), the weight of each column in the search for the grid's parameters; `parameters` gives them
    instead of searching.
    """
    weight = weight.float().masked_fill(factor.dead, 0)  # before the grid: what is dead needs no range
    parameters = parameters or search(weight, scheme, energy, min_zero)
    lattice, lows = lattice_of(parameters)
    columns = weight.shape[1] // len(lattice.scales)
    wanted = weight.T.contiguous()
    if lows is not None:
        wanted += lows.repeat_interleave(columns, 0)
    levels = solve(wanted[factor.order], lattice, factor.order // columns, factor.feedback)
    return from_columns(parameters, lattice, levels[torch.argsort(factor.order)])


def solve(weight: Tensor, lattice: Lattice, group: Tensor, feedback: Tensor) -> Tensor:
    """The columns of a weight as rows, float32 [in, out] in rounding order -> levels, float32 [in, out].

    lattice: of [groups, out]; group: int64 [in], the group of each column; feedback: as in `Factor`.
    """
    work, levels = weight.clone(), torch.empty_like(weight)
    for start in range(0, len(weight), wide(weight.device)):
        stop = min(start + wide(weight.device), len(weight))
        part = slice(start, stop)
        levels[part], errors = round_run(work[part], weight[part], lattice, group[part], feedback[part, part])
        accumulate_(work[stop:], feedback[stop:, part].T, errors)
    return levels
