# SPDX-License-Identifier: Apache-2.0
"""Large matrix products: float32 results, at the speed of 16-bit products where a GPU offers it.

A GPU multiplies bfloat16 an order of magnitude faster than float32, and sums the products in float32. A float32 number
is the sum of two bfloat16 numbers up to 2^-17 of itself, a = a1 + a2, so

    a b ~ a1 b1 + a1 b2 + a2 b1

is one bfloat16 product over three times the terms, and right to about 2^-16: what tf32 (2^-11) is not, at tf32's price
(Henry, Tang, Heinecke, arXiv 1904.06376). A product of numbers that are 16-bit to begin with is exact term by term.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TERMS_AT_ONCE = 2048  # of the sum in a split product: bounds the memory of the split copies
HALVES = 8  # strips of columns in which the upper half of a symmetric product is made: 56% of all the work
NARROWEST_STRIP = 512


def accumulate_(total: Tensor, left: Tensor, right: Tensor, *, exact: bool = True) -> Tensor:
    """total += left.T @ right, in place.

    total: float32 [m, n]; left: [k, m], right: [k, n], both float32 or of one 16-bit type.
    exact: False lets a GPU round float32 to bfloat16 once (2^-9), where that is enough.
    """
    if not _fast(left):
        return total.addmm_(left.T.float(), right.float())
    if left.dtype != torch.float32:
        return _accumulate_16bit(total, left, right)
    for a, b in zip(left.split(TERMS_AT_ONCE), right.split(TERMS_AT_ONCE), strict=True):
        if exact:
            (a1, a2), (b1, b2) = _split(a), _split(b)
            a, b = torch.cat([a1, a1, a2]), torch.cat([b1, b2, b1])
        _accumulate_16bit(total, a.bfloat16(), b.bfloat16())
    return total


def strips(gram: Tensor) -> list[slice]:
    """The rows of a symmetric matrix [in, in] that are made at once, of which only what is right of the diagonal is."""
    width = max(NARROWEST_STRIP, -(-len(gram) // HALVES))
    return [slice(start, min(start + width, len(gram))) for start in range(0, len(gram), width)]


def accumulate_gram_(gram: Tensor, x: Tensor, rows: Sequence[slice] | None = None) -> Tensor:
    """gram += x.T @ x for x [tokens, in], in place: only the upper triangle, see `mirror_`, and what lies beside it.

    rows: the `strips` to do, if not all
    """
    for strip in strips(gram) if rows is None else rows:
        accumulate_(gram[strip, strip.start :], x[:, strip], x[:, strip.start :])
    return gram


def mirror_(gram: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix to the lower one, in place."""
    for start in range(0, len(gram), NARROWEST_STRIP):
        stop = min(start + NARROWEST_STRIP, len(gram))
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def product(left: Tensor, right: Tensor, *, exact: bool = True) -> Tensor:
    """left [m, k] @ right [k, n] in float32; see `accumulate_`."""
    if not _fast(left):
        return left.float() @ right.float()
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    return accumulate_(total, left.T, right, exact=exact)


def _fast(like: Tensor) -> bool:
    """Whether 16-bit products with a float32 result are there, and faster."""
    return like.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out")


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _accumulate_16bit(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.aten.addmm.dtype_out(total, left.T, right, torch.float32, out=total)  # type: ignore[no-any-return]
