# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the loops that are nearly all launch overhead when a GPU runs them operation by operation.

Each does what a PyTorch function beside its caller does, named in its docstring; that function is the oracle of the
tests and runs where Triton or a GPU is missing. Sums are taken in another order, so a value within rounding of a tie
may go to the other side of it. The kernels themselves carry no type hints: Triton reads them as code.
"""

from functools import cache

import torch
from torch import Tensor

from quantkit.scheme import Scheme

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine
    triton = None

ROWS = 32  # of a weight, in one program: one a thread, so that no sum goes from thread to thread
WIDEST_IMPROVED = 256  # columns that one program goes over
STEPS = 32  # columns whose errors lie in registers, before the others of the block hear of them in a product
WIDEST_GROUP = 1024  # columns of a group that fit in registers


def usable(like: Tensor) -> bool:
    """Whether the kernels run where this tensor is."""
    return triton is not None and (like.device.type == "cuda" or _interpreted())


def rounds(scheme: Scheme, in_features: int) -> bool:
    """Whether `scaled_differences` rounds this scheme."""
    return scheme.grid == "integer" and scheme.columns_per_group(in_features) <= WIDEST_GROUP


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 has the kernels run in Python, as the tests do on a CPU."""
    return not isinstance(_round_block, triton.JITFunction)


@cache
def _precise() -> str:
    """How Triton multiplies float32 to its last bits: on tensor cores where they take tf32, in three products."""
    fast = torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "tf32x3" if fast else "ieee"


def round_block(
    target: Tensor,
    base: Tensor,
    grid: tuple[Tensor, Tensor, int],
    group: Tensor,
    feedback: Tensor,
    results: tuple[Tensor, Tensor],
) -> None:
    """`methods.columns.round_block_by_torch` in one launch: rows in parallel, errors in registers. Overwrites target.

    grid: scales, zeros, and the largest code; results: levels and errors, filled
    """
    columns, rows = target.shape
    (scales, zeros, max_code), (steps, errors) = grid, results
    assert all(x.is_contiguous() for x in (target, base, scales, zeros, group, steps, errors))
    assert feedback.stride(1) == 1
    _round_block[(triton.cdiv(rows, ROWS),)](
        target,
        base,
        scales,
        zeros,
        group,
        feedback,
        steps,
        errors,
        rows,
        columns,
        feedback.stride(0),
        max_code,
        STEPS,
        ROWS,
        _precise(),
        num_warps=1,  # no step waits for another warp
        enable_fp_fusion=True,
    )


def improve_group(
    x: Tensor,
    pull: Tensor,
    bend: Tensor,
    quadratic: tuple[Tensor, Tensor],
    grid: tuple[Tensor, Tensor, int],
    errors: Tensor,
) -> None:
    """`methods.columns.improve_group_by_torch` in one launch, for a group of up to `WIDEST_IMPROVED` columns.

    Overwrites pull and bend; errors may be of 16 bit.
    quadratic: energy and feedback; grid: scale, zero, the largest code
    """
    columns, rows = x.shape
    (energy, feedback), (scale, zero, max_code) = quadratic, grid
    assert all(t.is_contiguous() for t in (x, pull, bend, energy, scale, zero, errors))
    assert feedback.stride(1) == 1
    _improve_group[(triton.cdiv(rows, ROWS),)](
        x,
        pull,
        bend,
        energy,
        feedback,
        scale,
        zero,
        errors,
        rows,
        columns,
        feedback.stride(0),
        max_code,
        STEPS,
        ROWS,
        _precise(),
        num_warps=1,
        enable_fp_fusion=True,
    )


def search(w: Tensor, importance: Tensor, scheme: Scheme, min_zero: int) -> tuple[Tensor, Tensor]:
    """`grids.integer.search_by_torch` in one pass over the weights: a group's candidates are judged in registers."""
    out, groups, columns = w.shape
    scale, zero = (torch.empty(out, groups, device=w.device) for _ in range(2))
    width = triton.next_power_of_2(columns)
    height = max(1, min(16, 2048 // width))
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
        enable_fp_fusion=True,
    )
    return scale, zero


def scaled_differences(
    weight: Tensor, scales: Tensor, scheme: Scheme, min_zero: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`methods.awq.scaled_differences_by_torch` in one pass, in a type of 16 bit.

    Scales beyond float16 are its largest.
    """
    out, columns = weight.shape
    groups = scheme.groups(columns)
    differences = torch.empty(len(scales), out, columns, dtype=dtype, device=weight.device)
    width = triton.next_power_of_2(columns // groups)
    height = max(1, min(16, 2048 // width))
    _scaled_differences[(triton.cdiv(out, height), groups, len(scales))](
        weight.contiguous(),
        scales.contiguous(),
        differences,
        out,
        groups,
        columns // groups,
        float(scheme.max_code),
        float(scheme.middle),
        float(min_zero),
        scheme.symmetric,
        width,
        height,
        enable_fp_fusion=False,
    )
    return differences


if triton is not None:

    @triton.jit
    def _rounded(x):
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even

    @triton.jit
    def _column(target, base, scales, zeros, group, j, stop, rows, row):
        """Of column j, if it comes before `stop`: what is wanted, what errors are counted from, scales, zero points.
        group: None where all are of one
        """
        inside, at = row < rows * (j < stop), j * rows + row
        in_group = row if group is None else tl.load(group + tl.minimum(j, stop - 1)) * rows + row
        return (
            tl.load(target + at, mask=inside, other=0.0),
            tl.load(base + at, mask=inside, other=0.0),
            tl.load(scales + in_group, mask=inside, other=1.0),
            tl.load(zeros + in_group, mask=inside, other=0.0),
        )

    @triton.jit
    def _moves(feedback, j, start, stop, stride, k):
        """What the columns from `start` on that come before j move it by."""
        return tl.load(feedback + j * stride + start + k, mask=k < (j - start) * (j < stop), other=0.0)

    @triton.jit
    def _round_column(made, moves, wanted, whole, scale, zero, max_code, mine):
        """The steps of a column, and the errors of all columns so far with its own among them."""
        value = wanted + tl.sum(made * moves[:, None], 0)
        step = _rounded(tl.minimum(tl.maximum(tl.div_rn(value, scale), -zero), max_code - zero))
        return step, tl.where(mine[:, None], (whole - step * scale)[None, :], made)

    @triton.jit
    def _round_block(
        target,
        base,
        scales,
        zeros,
        group,
        feedback,
        steps,
        errors,
        rows,
        columns,
        stride,
        max_code,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        _round_rows(
            target,
            base,
            scales,
            zeros,
            group,
            feedback,
            steps,
            errors,
            rows,
            columns,
            stride,
            max_code,
            row,
            WIDTH,
            HEIGHT,
            PRECISION,
            False,
        )

    @triton.jit
    def _round_rows(
        target,
        base,
        scales,
        zeros,
        group,
        feedback,
        steps,
        errors,
        rows,
        columns,
        stride,
        max_code,
        row,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
        PRECISION: tl.constexpr,
        ADDS: tl.constexpr,
    ):
        """Round all columns of some rows. ADDS: to the errors that are there"""
        k = tl.arange(0, WIDTH)
        for start in range(0, columns, WIDTH):
            made = tl.zeros([WIDTH, HEIGHT], dtype=tl.float32)  # the errors of these columns so far
            stop = tl.minimum(start + WIDTH, columns)
            for j in range(start, stop, 4):  # four columns' loads at a time: memory is far
                wanted0, whole0, scale0, zero0 = _column(target, base, scales, zeros, group, j, stop, rows, row)
                wanted1, whole1, scale1, zero1 = _column(target, base, scales, zeros, group, j + 1, stop, rows, row)
                wanted2, whole2, scale2, zero2 = _column(target, base, scales, zeros, group, j + 2, stop, rows, row)
                wanted3, whole3, scale3, zero3 = _column(target, base, scales, zeros, group, j + 3, stop, rows, row)
                moves0 = _moves(feedback, j, start, stop, stride, k)
                moves1 = _moves(feedback, j + 1, start, stop, stride, k)
                moves2 = _moves(feedback, j + 2, start, stop, stride, k)
                moves3 = _moves(feedback, j + 3, start, stop, stride, k)
                i = j - start
                step0, made = _round_column(made, moves0, wanted0, whole0, scale0, zero0, max_code, k == i)
                step1, made = _round_column(made, moves1, wanted1, whole1, scale1, zero1, max_code, k == i + 1)
                step2, made = _round_column(made, moves2, wanted2, whole2, scale2, zero2, max_code, k == i + 2)
                step3, made = _round_column(made, moves3, wanted3, whole3, scale3, zero3, max_code, k == i + 3)
                at = j * rows + row
                tl.store(steps + at, step0, mask=row < rows)
                tl.store(steps + at + rows, step1, mask=row < rows * (j + 1 < stop))
                tl.store(steps + at + 2 * rows, step2, mask=row < rows * (j + 2 < stop))
                tl.store(steps + at + 3 * rows, step3, mask=row < rows * (j + 3 < stop))
            at = (start + k)[:, None] * rows + row[None, :]
            inside = (start + k < stop)[:, None] & (row < rows)[None, :]
            if ADDS:
                tl.store(errors + at, made + tl.load(errors + at, mask=inside, other=0.0), mask=inside)
            else:
                tl.store(errors + at, made, mask=inside)
            for other in range(start + WIDTH, columns, WIDTH):  # the columns after these hear of their errors
                later = other + k
                move = feedback + later[:, None] * stride + (start + k)[None, :]
                moves = tl.load(move, mask=(later < columns)[:, None], other=0.0)
                to = later[:, None] * rows + row[None, :]
                within = (later < columns)[:, None] & (row < rows)[None, :]
                value = tl.load(target + to, mask=within, other=0.0)
                tl.store(target + to, value + tl.dot(moves, made, input_precision=PRECISION), mask=within)
            tl.debug_barrier()  # threads read next what others have written

    @triton.jit
    def _stored(scale):
        """As `grids.base.nearest_float16`, but for scales beyond float16."""
        sign = tl.where(scale < 0, -1.0, 1.0)
        held = tl.minimum(tl.maximum(tl.abs(scale), 5.9604644775390625e-08), 65504.0)
        return (held * sign).to(tl.float16).to(tl.float32)

    @triton.jit
    def _improve_group(
        x,
        pull,
        bend,
        energy,
        feedback,
        scale,
        zero,
        errors,
        rows,
        columns,
        stride,
        max_code,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        here = row < rows
        slope = tl.zeros([HEIGHT], dtype=tl.float32)
        curvature = tl.zeros([HEIGHT], dtype=tl.float32)
        for start in range(0, columns, WIDTH):
            j = start + tl.arange(0, WIDTH)
            at = j[:, None] * rows + row[None, :]
            inside = (j < columns)[:, None] & here[None, :]
            step = tl.load(x + at, mask=inside, other=0.0)
            slope += tl.sum(step * tl.load(pull + at, mask=inside, other=0.0), 0)
            curvature += tl.sum(step * tl.load(bend + at, mask=inside, other=0.0), 0)
        old = tl.load(scale + row, mask=here, other=1.0)
        wanted = old + tl.div_rn(slope, tl.maximum(curvature, 1e-30))
        stored = _stored(wanted)
        sound = (curvature > 0) & ((stored < 0) == (old < 0)) & (tl.abs(wanted) < 65520.0)
        stored = tl.where(sound, stored, old)
        lost = old - stored
        tl.debug_barrier()
        tl.store(scale + row, stored, mask=here)
        for start in range(0, columns, WIDTH):  # what is wanted takes the place of `pull`, what stands that of `bend`
            j = start + tl.arange(0, WIDTH)
            at = j[:, None] * rows + row[None, :]
            inside = (j < columns)[:, None] & here[None, :]
            step = tl.load(x + at, mask=inside, other=0.0)
            weight = tl.load(energy + j, mask=j < columns, other=1.0)
            pulled = tl.load(pull + at, mask=inside, other=0.0)
            pulled += tl.load(bend + at, mask=inside, other=0.0) * lost[None, :]
            stands = step * stored[None, :]
            tl.store(errors + at, step * lost[None, :], mask=inside)
            tl.store(pull + at, stands + tl.div_rn(pulled, tl.broadcast_to(weight[:, None], pulled.shape)), mask=inside)
            tl.store(bend + at, stands, mask=inside)
        tl.debug_barrier()  # the next loop's threads read what other threads have written
        _round_rows(
            pull,
            bend,
            scale,
            zero,
            None,
            feedback,
            x,
            errors,
            rows,
            columns,
            stride,
            max_code,
            row,
            WIDTH,
            HEIGHT,
            PRECISION,
            True,
        )

    @triton.jit
    def _spanning(w, max_code, middle, min_zero, SYMMETRIC: tl.constexpr):
        """As `grids.integer._spanning`, for w [rows, columns] of one group."""
        low, high = tl.minimum(tl.min(w, 1), 0.0), tl.maximum(tl.max(w, 1), 0.0)
        tiny = 5.9604644775390625e-08
        if SYMMETRIC:
            reach = tl.maximum(tl.maximum(-low, high) / middle, tl.minimum(-low, high) / (middle - 1))
            reach = tl.maximum(reach, tiny)
            scale = tl.where(-low >= high, reach, -reach)
            zero = tl.zeros_like(scale) + middle
        else:
            scale = tl.maximum(tl.maximum((high - low) / max_code, high / (max_code - min_zero)), tiny)
            zero = tl.minimum(tl.maximum(_rounded(-low / scale), min_zero), max_code)
        return scale, zero

    @triton.jit
    def _grid_steps(w, scale, zero, max_code):
        """The codes minus zero points of w [rows, columns] on the grids of its rows."""
        low = -zero[:, None]
        ratio = tl.div_rn(w, tl.broadcast_to(_stored(scale)[:, None], w.shape))
        return _rounded(tl.minimum(tl.maximum(ratio, low), low + max_code))

    @triton.jit
    def _grid_error(w, importance, scale, zero, max_code):
        difference = _grid_steps(w, scale, zero, max_code) * _stored(scale)[:, None] - w
        return tl.sum(difference * difference * importance, 1)

    @triton.jit
    def _scaled_differences(
        weights,
        scales,
        differences,
        out,
        groups,
        columns,
        max_code,
        middle,
        min_zero,
        SYMMETRIC: tl.constexpr,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
        candidate = tl.program_id(2).to(tl.int64)
        k = tl.arange(0, WIDTH)
        column = tl.program_id(1) * columns + k
        inside = (row < out)[:, None] & (k < columns)[None, :]
        size = tl.load(scales + candidate * groups * columns + column, mask=k < columns, other=1.0)[None, :]
        w = tl.load(weights + row[:, None] * groups * columns + column[None, :], mask=inside, other=0.0)
        w = w.to(tl.float32) * size
        scale, zero = _spanning(w, max_code, middle, min_zero, SYMMETRIC)
        error = _grid_steps(w, scale, zero, max_code) * _stored(scale)[:, None] - w
        at = (candidate * out + row)[:, None] * groups * columns + column[None, :]
        tl.store(differences + at, tl.div_rn(error, tl.broadcast_to(size, error.shape)), mask=inside)

    @triton.jit
    def _better(w, importance, max_code, scale, zero, best, at_scale, at_zero):
        """The better of a candidate and the best so far: scale, zero and error."""
        error = _grid_error(w, importance, scale, zero, max_code)
        better = error < best
        return tl.where(better, scale, at_scale), tl.where(better, zero, at_zero), tl.where(better, error, best)

    @triton.jit
    def _search(
        weights,
        importances,
        scales,
        zeros,
        out,
        groups,
        columns,
        max_code,
        middle,
        min_zero,
        SYMMETRIC: tl.constexpr,
        WIDTH: tl.constexpr,
        HEIGHT: tl.constexpr,
    ):
        row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        group = tl.program_id(1)
        k = tl.arange(0, WIDTH)
        at = row.to(tl.int64)[:, None] * groups * columns + group * columns + k[None, :]
        w = tl.load(weights + at, mask=(row < out)[:, None] & (k < columns)[None, :], other=0.0)
        importance = tl.load(importances + group * columns + k, mask=k < columns, other=0.0)[None, :]
        scale, zero = _spanning(w, max_code, middle, min_zero, SYMMETRIC)
        lowest, highest = tl.min(w, 1), tl.max(w, 1)
        if SYMMETRIC:
            widest = tl.maximum(tl.maximum(-lowest, highest) / (middle - 0.5), 5.9604644775390625e-08)
            widest = tl.where(-lowest >= highest, widest, -widest)
            exact = zero
        else:
            widest = scale
            exact = -tl.minimum(lowest, 0.0) / widest
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
