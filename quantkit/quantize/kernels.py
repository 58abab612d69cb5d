# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the loops that are nearly all launch overhead when a GPU runs them operation by operation.

Each does what a PyTorch function beside its caller does, named in its docstring; that function is the oracle of the
tests and runs where Triton or a GPU is missing. Sums are taken in another order, so a value within rounding of a tie
may go to the other side of it.
"""

from typing import Any

import torch
from torch import Tensor

from quantkit.scheme import Scheme

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine
    triton = None

ROWS = 16  # of a weight, in one program
WIDEST_GROUP = 1024  # columns of a group that fit in registers


def usable(like: Tensor) -> bool:
    """Whether the kernels run where this tensor is."""
    return triton is not None and (like.device.type == "cuda" or _interpreted())


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 has the kernels run in Python, as the tests do on a CPU."""
    return not isinstance(_round_block, triton.JITFunction)


def round_block(
    target: Tensor,
    base: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    feedback: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor]:
    """`columns.round_block_by_torch` in one launch: rows in parallel, errors in registers. At most 128 columns."""
    columns, rows = target.shape
    assert all(x.is_contiguous() for x in (target, base, scales, zeros, group))
    steps, errors = torch.empty_like(target), torch.empty_like(target)
    _round_block[(triton.cdiv(rows, ROWS),)](
        target, base, scales, zeros, group, feedback.T.contiguous(), steps, errors, rows, columns, max_code, 128, ROWS
    )
    return steps, errors


def search(w: Tensor, importance: Tensor, scheme: Scheme, min_zero: int) -> tuple[Tensor, Tensor]:
    """`grid.search_by_torch` in one pass over the weights: a group's candidates are judged in registers."""
    out, groups, columns = w.shape
    scale, zero = (torch.empty(out, groups, device=w.device) for _ in range(2))
    width = triton.next_power_of_2(columns)
    height = max(1, min(ROWS, 2048 // width))
    _search[(triton.cdiv(out, height), groups)](
        w.contiguous(),
        importance.contiguous(),
        scale,
        zero,
        out,
        groups,
        columns,
        float(scheme.max_code),
        float(scheme.middle),
        float(min_zero),
        scheme.symmetric,
        width,
        height,
    )
    return scale, zero


if triton is not None:

    @triton.jit
    def _rounded(x: Any) -> Any:
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even

    @triton.jit
    def _round_block(
        target: Any,
        base: Any,
        scales: Any,
        zeros: Any,
        group: Any,
        feedback: Any,  # transposed: row j holds what moves column j
        steps: Any,
        errors: Any,
        rows: Any,
        columns: Any,
        max_code: Any,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
    ) -> None:
        row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        here = row < rows
        k = tl.arange(0, WIDTH)
        made = tl.zeros([HEIGHT, WIDTH], dtype=tl.float32)  # the errors so far
        for j in range(columns):
            moves = tl.load(feedback + j * columns + k, mask=k < j, other=0.0)
            at = j * rows + row
            in_group = tl.load(group + j) * rows + row
            scale = tl.load(scales + in_group, mask=here, other=1.0)
            low = -tl.load(zeros + in_group, mask=here, other=0.0)
            value = tl.load(target + at, mask=here, other=0.0) + tl.sum(made * moves[None, :], 1)
            bounded = tl.minimum(tl.maximum(tl.div_rn(value, scale), low), low + max_code)
            step = _rounded(bounded)
            error = tl.load(base + at, mask=here, other=0.0) - step * scale
            tl.store(steps + at, step, mask=here)
            tl.store(errors + at, error, mask=here)
            made = tl.where((k == j)[None, :], error[:, None], made)

    @triton.jit
    def _stored(scale: Any) -> Any:
        """As `grid.nearest_float16`."""
        sign = tl.where(scale < 0, -1.0, 1.0)
        return (tl.maximum(tl.abs(scale), 5.9604644775390625e-08) * sign).to(tl.float16).to(tl.float32)

    @triton.jit
    def _grid_steps(w: Any, scale: Any, zero: Any, max_code: Any) -> Any:
        """The codes minus zero points of w [rows, columns] on the grids of its rows."""
        low = -zero[:, None]
        ratio = tl.div_rn(w, tl.broadcast_to(_stored(scale)[:, None], w.shape))
        return _rounded(tl.minimum(tl.maximum(ratio, low), low + max_code))

    @triton.jit
    def _grid_error(w: Any, importance: Any, scale: Any, zero: Any, max_code: Any) -> Any:
        difference = _grid_steps(w, scale, zero, max_code) * _stored(scale)[:, None] - w
        return tl.sum(difference * difference * importance, 1)

    @triton.jit
    def _better(
        w: Any, importance: Any, max_code: Any, scale: Any, zero: Any, best: Any, at_scale: Any, at_zero: Any
    ) -> Any:
        """The better of a candidate and the best so far: scale, zero and error."""
        error = _grid_error(w, importance, scale, zero, max_code)
        better = error < best
        return tl.where(better, scale, at_scale), tl.where(better, zero, at_zero), tl.where(better, error, best)

    @triton.jit
    def _search(
        weights: Any,
        importances: Any,
        scales: Any,
        zeros: Any,
        out: Any,
        groups: Any,
        columns: Any,
        max_code: Any,
        middle: Any,
        min_zero: Any,
        SYMMETRIC: tl.constexpr,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
    ) -> None:
        row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        group = tl.program_id(1)
        k = tl.arange(0, WIDTH)
        at = row.to(tl.int64)[:, None] * groups * columns + group * columns + k[None, :]
        w = tl.load(weights + at, mask=(row < out)[:, None] & (k < columns)[None, :], other=0.0)
        importance = tl.load(importances + group * columns + k, mask=k < columns, other=0.0)[None, :]
        lowest, highest = tl.min(w, 1), tl.max(w, 1)
        low, high = tl.minimum(lowest, 0.0), tl.maximum(highest, 0.0)
        tiny = 5.9604644775390625e-08
        if SYMMETRIC:
            reach = tl.maximum(tl.maximum(-low, high) / middle, tl.minimum(-low, high) / (middle - 1))
            reach = tl.maximum(reach, tiny)
            scale = tl.where(-low >= high, reach, -reach)
            zero = tl.zeros([HEIGHT], dtype=tl.float32) + middle
            widest = tl.maximum(tl.maximum(-low, high) / (middle - 0.5), tiny)
            widest = tl.where(-lowest >= highest, widest, -widest)
            exact = zero
        else:
            scale = tl.maximum(tl.maximum((high - low) / max_code, high / (max_code - min_zero)), tiny)
            widest = scale
            exact = -low / widest
            zero = tl.minimum(tl.maximum(_rounded(exact), min_zero), max_code)
        best = _grid_error(w, importance, scale, zero, max_code)
        for i in range(17):
            shrunk = widest * (1.0 - 0.04 * i)
            if SYMMETRIC:
                scale, zero, best = _better(w, importance, max_code, shrunk, exact, best, scale, zero)
                scale, zero, best = _better(w, importance, max_code, -shrunk, exact, best, scale, zero)
            else:
                below = tl.minimum(tl.maximum(tl.floor(exact), min_zero), max_code)
                above = tl.minimum(tl.maximum(tl.ceil(exact), min_zero), max_code)
                scale, zero, best = _better(w, importance, max_code, shrunk, below, best, scale, zero)
                scale, zero, best = _better(w, importance, max_code, shrunk, above, best, scale, zero)
        centre_scale, centre_zero = scale, zero
        for shift in range(1 if SYMMETRIC else 3):
            shifted = centre_zero + (0 if SYMMETRIC else shift - 1)
            shifted = tl.minimum(tl.maximum(shifted, 0.0 if SYMMETRIC else min_zero), max_code)
            for i in range(7):
                step = centre_scale * (0.94 + 0.02 * i)
                scale, zero, best = _better(w, importance, max_code, step, shifted, best, scale, zero)
        for _ in range(2):
            codes = _grid_steps(w, scale, zero, max_code)
            norm = tl.sum(codes * importance * codes, 1)
            fitted = tl.sum(codes * importance * w, 1) / tl.maximum(norm, 1e-30)
            wanted = tl.where(norm > 0, fitted, scale)
            scale, zero, best = _better(w, importance, max_code, wanted, zero, best, scale, zero)
        tl.store(scales + row * groups + group, scale, mask=row < out)
        tl.store(zeros + row * groups + group, zero, mask=row < out)
