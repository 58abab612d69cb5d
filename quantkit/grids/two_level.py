# SPDX-License-Identifier: Apache-2.0
"""K-quants: superblocks of 256 columns whose groups share a float16 step and have whole-number scales of their own.

    w ~ d s q - dmin l        (q4_k, q5_k: 8 groups of 32, s and l in 0 .. 63, q in 0 .. 15 or 0 .. 31)
    w ~ d s (q - 32)          (q6_k: 16 groups of 16, s in -128 .. 127, q in 0 .. 63)

As in llama.cpp (ggml-quants.c) the error that is minimised weighs each input column by its importance,

    sum_j e_j (w_j - Q(w_j))^2            e = diag(H), the energy of column j

by trying several ranges per group, each with its least-squares step and low. What is added: after the scales became
whole numbers, the superblock's d and dmin are fitted again to the codes, and the neighbouring whole numbers are tried
with the codes they lead to.

A `QuantizedTensor` of these has the whole numbers s as int16 scales, l as int16 zeros, and d, dmin as its `outer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grids.base import (
    ROWS_AT_ONCE,
    ROWS_AT_ONCE_GPU,
    SMALLEST_SCALE,
    Grid,
    Parameters,
    Spacing,
    relative_energy,
    to_float16,
)
from quantkit.scheme import Scheme, expand

SUPERBLOCK = 256
RANGES = tuple(0.08 * i for i in range(-12, 13))  # added to the largest code: how much of a group's range it spans
ROUNDS = 2


@dataclass(frozen=True)
class Kind:
    """columns of a group, the largest code, what is taken off codes, and the largest scale of a group."""

    columns: int
    max_code: int
    zero: int
    max_scale: int


KINDS = {"q4_k": Kind(32, 15, 0, 63), "q5_k": Kind(32, 31, 0, 63), "q6_k": Kind(16, 63, 32, 127)}


def search(weight: Tensor, scheme: Scheme, energy: Tensor | None = None, min_zero: int = 0) -> Parameters:
    """Scales and lows of both levels with the least weighted squared error; weight [out, in], energy [in].

    Raises:
        SchemeError: rows that are no whole number of superblocks.
    """
    return _found(weight, scheme, energy, RANGES, ROUNDS)


def plain(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> Parameters:
    """The same with each group's whole range, quickly."""
    return _found(weight, scheme, None, (), 0)


def _found(weight: Tensor, scheme: Scheme, energy: Tensor | None, ranges: tuple[float, ...], rounds: int) -> Parameters:
    kind = KINDS[scheme.grid]
    if weight.shape[1] % SUPERBLOCK:
        raise SchemeError(f"{scheme} cuts rows into superblocks of {SUPERBLOCK}, got in_features {weight.shape[1]}")
    importance = relative_energy(energy, weight).view(1, -1, SUPERBLOCK // kind.columns, kind.columns)
    at_once = ROWS_AT_ONCE if weight.device.type == "cpu" else ROWS_AT_ONCE_GPU
    parts = weight.float().split(max(1, at_once // weight.shape[1]))
    results = [_search(rows, kind, importance, ranges, rounds) for rows in parts]
    scales, lows, d, dmin = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    return Parameters(scheme, scales, lows, {"d": d, "dmin": dmin})


def spacing(parameters: Parameters) -> Spacing:
    """The two levels of scales multiplied out."""
    kind = KINDS[parameters.scheme.grid]
    units, low_units = _per_group(parameters)
    scales = units * parameters.scales.float()
    zeros = torch.full_like(scales, kind.zero)
    lows = None if kind.zero else low_units * parameters.zeros.float()
    return Spacing(scales, zeros, lows, units)


def _per_group(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """d and dmin for each group, float32 [out, groups]."""
    d, dmin = parameters.outer["d"], parameters.outer["dmin"]
    groups = parameters.scales.shape[1] // d.shape[1]
    return expand(d.float(), groups), expand(dmin.float(), groups)


def store(scales: Tensor, units: Tensor | None, kind: Kind) -> Tensor:
    """The nearest whole multiples of the units."""
    assert units is not None
    return _allowed(torch.round(scales / units), kind) * units


def restored(parameters: Parameters, scales: Tensor) -> Parameters:
    """The parameters with other scales of the groups, as whole multiples of d."""
    whole = _allowed(torch.round(scales / _per_group(parameters)[0]), KINDS[parameters.scheme.grid])
    return replace(parameters, scales=whole.to(torch.int16).contiguous())


def divided(parameters: Parameters, divisors: Tensor) -> Parameters:
    """The parameters of the weight with its rows divided: d and dmin are."""
    outer = {name: to_float16(unit.float() / divisors.unsqueeze(1)) for name, unit in parameters.outer.items()}
    return replace(parameters, outer=outer)


GRIDS = tuple(
    Grid(name, plain, search, spacing, partial(store, kind=kind), restored, divided, searches=True)
    for name, kind in KINDS.items()
)


# ---------------------------------------------------------------- the search: [rows, superblocks, groups(, columns)]


def _search(rows: Tensor, kind: Kind, importance: Tensor, ranges: tuple[float, ...], rounds: int) -> tuple[Tensor, ...]:
    """The whole scales and lows, d and dmin of some rows [rows, in]."""
    w = rows.view(len(rows), *importance.shape[1:])
    step, low = (_signed if kind.zero else _ranges)(w, kind, importance, ranges)
    curvature = importance.sum(3).expand(step.shape)
    d = _first_level(step, curvature, kind.max_scale)
    dmin = torch.zeros_like(d) if kind.zero else _first_level(low, curvature, kind.max_scale)
    scales, lows = _whole(step, d, kind), torch.zeros_like(low) if kind.zero else _whole(low, dmin, kind)
    for _ in range(rounds):
        codes = _codes(w, d, dmin, scales, lows, kind)
        d, dmin = _refit(w, codes, scales, lows, d, dmin, importance, kind)
        scales, lows = _neighbours(w, d, dmin, scales, lows, importance, kind)
    whole = (part.flatten(1).to(torch.int16) for part in (scales, lows))
    return *whole, d.to(torch.float16), dmin.to(torch.float16)


def _ranges(w: Tensor, kind: Kind, importance: Tensor, ranges: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The best step and low (not below 0) of each group by itself."""
    floor, top = w.amin(3).clamp(max=0), w.amax(3)
    span = (top - floor).clamp(min=SMALLEST_SCALE)
    total, total_w = importance.sum(3), (importance * w).sum(3)
    best_step, best_low = span / kind.max_code, -floor
    best = _error(w, _round(w, best_step, best_low, kind), best_step, best_low, importance)
    for more in ranges:
        codes = _round(w, span / (kind.max_code + more), -floor, kind)
        weighted = importance * codes
        c, cc, cw = weighted.sum(3), (weighted * codes).sum(3), (weighted * w).sum(3)
        determinant = total * cc - c * c
        step = (total * cw - total_w * c) / determinant
        low = (c * cw - cc * total_w) / determinant
        alone = cw / cc.clamp(min=1e-30)  # the step where the best low would be negative
        step, low = torch.where(low < 0, alone, step), low.clamp(min=0)
        error = _error(w, codes, step, low, importance)
        better = (determinant > 0) & (step > 0) & (error < best)  # false for NaN
        best_step, best_low = torch.where(better, step, best_step), torch.where(better, low, best_low)
        best = torch.where(better, error, best)
    return best_step, best_low


def _signed(w: Tensor, kind: Kind, importance: Tensor, ranges: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The best step, of either sign, of each group by itself."""
    low, high = w.amin(3), w.amax(3)
    largest = torch.where(-low >= high, low, high)  # gets the longer half of the codes
    largest = torch.where(largest == 0, SMALLEST_SCALE, largest)
    none = torch.zeros_like(largest)
    best_step = -largest / kind.zero
    best = _error(w, _round(w, best_step, none, kind), best_step, none, importance)
    for more in ranges:
        codes = _round(w, -largest / (kind.zero + more), none, kind)
        weighted = importance * codes
        step = (weighted * w).sum(3) / (weighted * codes).sum(3)
        error = _error(w, codes, step, none, importance)
        better = (step != 0) & (error < best)
        best_step, best = torch.where(better, step, best_step), torch.where(better, error, best)
    return best_step, none


def _round(w: Tensor, step: Tensor, low: Tensor, kind: Kind) -> Tensor:
    """Codes less the zero, as floats."""
    codes = torch.round((w + low.unsqueeze(3)) / step.unsqueeze(3))
    return codes.clamp_(-kind.zero, kind.max_code - kind.zero)


def _error(w: Tensor, codes: Tensor, step: Tensor, low: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error of each group."""
    value = codes * step.unsqueeze(3)
    return value.sub_(low.unsqueeze(3)).sub_(w).square_().mul_(importance).sum(3)


def _first_level(values: Tensor, weights: Tensor, largest: int) -> Tensor:
    """The float16 unit d [rows, superblocks] by which whole numbers up to `largest` best make up the values."""
    extreme = values.gather(2, values.abs().argmax(2, keepdim=True)).squeeze(2)
    extreme = torch.where(extreme == 0, SMALLEST_SCALE, extreme)
    best_unit, best = extreme / largest, torch.full_like(extreme, torch.inf)
    for more in range(-4, 5):
        unit = (extreme / (largest + 0.1 * more)).unsqueeze(2)
        whole = torch.round(values / unit).clamp(-largest, largest)
        weighted = weights * whole
        fitted = (weighted * values).sum(2) / (weighted * whole).sum(2).clamp(min=1e-30)
        fitted = torch.where(fitted == 0, unit.squeeze(2), fitted)
        error = (weights * (values - fitted.unsqueeze(2) * whole).square()).sum(2)
        best_unit, best = torch.where(error < best, fitted, best_unit), torch.minimum(error, best)
    return _float16(best_unit)


def _float16(unit: Tensor) -> Tensor:
    return to_float16(unit).float()


def _whole(values: Tensor, unit: Tensor, kind: Kind) -> Tensor:
    return _allowed(torch.round(values / unit.unsqueeze(2)), kind)


def _allowed(whole: Tensor, kind: Kind) -> Tensor:
    return whole.clamp(-kind.max_scale - 1, kind.max_scale) if kind.zero else whole.clamp(0, kind.max_scale)


def _codes(w: Tensor, d: Tensor, dmin: Tensor, scales: Tensor, lows: Tensor, kind: Kind) -> Tensor:
    step = d.unsqueeze(2) * scales
    return _round(w, torch.where(step == 0, SMALLEST_SCALE, step), dmin.unsqueeze(2) * lows, kind)


def _refit(
    w: Tensor, codes: Tensor, scales: Tensor, lows: Tensor, d: Tensor, dmin: Tensor, importance: Tensor, kind: Kind
) -> tuple[Tensor, Tensor]:
    """d and dmin by least squares, given all that is whole; kept where that is not sound or no better in float16."""
    a, b = scales.unsqueeze(3) * codes, -lows.unsqueeze(3)
    aa, aw = (importance * a * a).sum((2, 3)), (importance * a * w).sum((2, 3))
    if kind.zero:
        new_d, new_dmin = aw / aa, dmin
    else:
        ab, bb, bw = ((importance * x * y).sum((2, 3)) for x, y in ((a, b), (b, b), (b, w)))
        determinant = aa * bb - ab * ab
        both = determinant > 1e-6 * aa * bb
        new_d = torch.where(both, (bb * aw - ab * bw) / determinant, (aw - ab * dmin) / aa)
        new_dmin = torch.where(both, (aa * bw - ab * aw) / determinant, dmin)

    def error(d: Tensor, dmin: Tensor) -> Tensor:
        return (importance * (d[..., None, None] * a + dmin[..., None, None] * b - w).square()).sum((2, 3))

    sound = torch.isfinite(new_d) & torch.isfinite(new_dmin) & (new_d * d > 0) & ((new_dmin > 0) | (kind.zero > 0))
    tried = _float16(torch.where(sound, new_d, d))
    tried_min = dmin if kind.zero else _float16(torch.where(sound, new_dmin, dmin))
    better = sound & (error(tried, tried_min) < error(d, dmin))
    return torch.where(better, tried, d), torch.where(better, tried_min, dmin)


def _neighbours(
    w: Tensor, d: Tensor, dmin: Tensor, scales: Tensor, lows: Tensor, importance: Tensor, kind: Kind
) -> tuple[Tensor, Tensor]:
    """For each group the best of the whole numbers next to its scale and low, each with its own nearest codes."""
    best_scales, best_lows, best = scales, lows, torch.full_like(scales, torch.inf)
    for change, change_low in _steps(kind):
        tried, tried_low = _allowed(scales + change, kind), _allowed(lows + change_low, kind) if change_low else lows
        codes = _codes(w, d, dmin, tried, tried_low, kind)
        error = _error(w, codes, d.unsqueeze(2) * tried, dmin.unsqueeze(2) * tried_low, importance)
        better = error < best
        best_scales, best_lows = torch.where(better, tried, best_scales), torch.where(better, tried_low, best_lows)
        best = torch.where(better, error, best)
    return best_scales, best_lows


def _steps(kind: Kind) -> Iterator[tuple[int, int]]:
    for low in (0,) if kind.zero else (0, -1, 1, -2, 2):
        for scale in (0, -1, 1):
            yield scale, low
