# SPDX-License-Identifier: Apache-2.0
"""Integers with a float16 scale for each group:

    w = (q - z) * s          0 <= q <= 2**bits - 1

Symmetric schemes fix z = 2**(bits - 1). Their scales may be negative: the code range is one longer below zero than
above it, and a negative scale puts the longer side where the larger weight is.

The plain grid spans the smallest to the largest weight of its group. A narrower one clips the few outermost weights
and represents all the others more finely. `search` minimises, for each row of each group,

    sum_j d_j (w_j - Q(w_j))^2          d = diag(H), the energy of input column j

over the shrinkage of the range, the neighbouring zero points, and then the scale that fits the chosen codes best
(least squares). Weighting by d is what makes clipping safe: without it a search trades a column that matters for
many that do not (llm-compressor issue 2094 measured the loss).
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit import kernels
from quantkit.grids.base import (
    ROWS_AT_ONCE,
    ROWS_AT_ONCE_GPU,
    SMALLEST_SCALE,
    Grid,
    Parameters,
    Spacing,
    nearest_float16,
    relative_energy,
    stored_in_float16,
    to_float16,
)
from quantkit.scheme import Scheme

SHRINKAGES = tuple(1.0 - 0.04 * i for i in range(17))  # 1.00 .. 0.36
FINE_STEPS = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)


def plain(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> Parameters:
    """The grid that just spans each group of weight [out, in]: round to nearest without clipping."""
    grouped = weight.float().unflatten(1, (scheme.groups(weight.shape[1]), -1))  # [out, groups, columns]
    scale, zero = _spanning(grouped, scheme, min_zero)
    return Parameters(scheme, to_float16(scale), zero.to(torch.uint8))


def search(weight: Tensor, scheme: Scheme, energy: Tensor | None = None, min_zero: int = 0) -> Parameters:
    """The grid with the least weighted squared error, with zero points of min_zero or more.

    weight [out, in]; energy [in] (diag of the Gram matrix; None weighs all columns alike)
    """
    groups = scheme.groups(weight.shape[1])
    columns = weight.shape[1] // groups
    importance = relative_energy(energy, weight).view(1, groups, columns)
    scales, zeros = [], []
    at_once = ROWS_AT_ONCE if weight.device.type == "cpu" else ROWS_AT_ONCE_GPU
    for rows in weight.split(max(1, at_once // weight.shape[1])):
        grouped = rows.float().unflatten(1, (groups, columns))
        fits = kernels.usable(grouped) and columns <= kernels.WIDEST_GROUP
        scale, zero = (kernels.search if fits else search_by_torch)(grouped, importance, scheme, min_zero)
        scales.append(to_float16(scale))
        zeros.append(zero.to(torch.uint8))
    return Parameters(scheme, torch.cat(scales), torch.cat(zeros))


def spacing(parameters: Parameters) -> Spacing:
    """Scales and zero points as they are."""
    return Spacing(parameters.scales.float(), parameters.zeros.float())


def restored(parameters: Parameters, scales: Tensor) -> Parameters:
    """The parameters with other scales [out, groups], rounded to float16."""
    return replace(parameters, scales=to_float16(scales).contiguous())


def divided(parameters: Parameters, divisors: Tensor) -> Parameters:
    """The parameters of the weight with its rows divided."""
    return restored(parameters, parameters.scales.float() / divisors.unsqueeze(1))


def _spanning(w: Tensor, scheme: Scheme, min_zero: int) -> tuple[Tensor, Tensor]:
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    if scheme.symmetric:
        # The larger side gets the longer half of the codes, through the sign of the scale; both sides fit.
        larger, smaller = torch.maximum(-low, high), torch.minimum(-low, high)
        reach = torch.maximum(larger / scheme.middle, smaller / (scheme.middle - 1)).clamp(min=SMALLEST_SCALE)
        scale = torch.where(-low >= high, reach, -reach)
        return scale, torch.full_like(scale, scheme.middle)
    # A zero point that may not be 0 leaves fewer codes above it, for the groups that need all of them.
    above = high / (scheme.max_code - min_zero)
    scale = torch.maximum((high - low) / scheme.max_code, above).clamp(min=SMALLEST_SCALE)
    return scale, torch.round(-low / scale).clamp(min_zero, scheme.max_code)


def _codes(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Codes minus their zero point, on the grid as it will be stored."""
    stored = nearest_float16(scale).float().unsqueeze(2)
    zero = zero.unsqueeze(2)
    return torch.round(w / stored).clamp_(min=-zero).clamp_(max=scheme.max_code - zero)


def _error(w: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    stored = nearest_float16(scale).float().unsqueeze(2)
    return (_codes(w, scale, zero, scheme).mul_(stored).sub_(w).square_().mul_(importance)).sum(2)


def search_by_torch(w: Tensor, importance: Tensor, scheme: Scheme, min_zero: int) -> tuple[Tensor, Tensor]:
    """The search: w float32 [out, groups, columns], importance [1, groups, columns] -> scale, zero [out, groups].

    It is the oracle of `kernels.search`, and what runs without it.
    """
    best_scale, best_zero = _spanning(w, scheme, min_zero)
    best_error = _error(w, best_scale, best_zero, importance, scheme)

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_scale, best_zero, best_error
        error = _error(w, scale, zero, importance, scheme)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)

    if scheme.symmetric:
        middle = torch.full_like(best_scale, scheme.middle)
        widest = w.abs().amax(2).clamp(min=SMALLEST_SCALE) / (scheme.middle - 0.5)
        sign = torch.where(-w.amin(2) >= w.amax(2), 1.0, -1.0)
        for shrinkage in SHRINKAGES:
            for direction in (sign, -sign):
                consider(widest * shrinkage * direction, middle)
    else:
        widest = best_scale
        exact = w.amin(2).clamp(max=0).neg() / widest  # the range shrinks about zero, which stays where it is
        for shrinkage in SHRINKAGES:
            for zero in (exact.floor(), exact.ceil()):
                consider(widest * shrinkage, zero.clamp(min_zero, scheme.max_code))
    centre_scale, centre_zero = best_scale, best_zero
    for shift in (0,) if scheme.symmetric else (-1, 0, 1):
        zero = (centre_zero + shift).clamp(min_zero, scheme.max_code)
        for step in FINE_STEPS:
            consider(centre_scale * step, zero)
    for _ in range(2):
        codes = _codes(w, best_scale, best_zero, scheme)
        weighted = codes * importance
        norm = (weighted * codes).sum(2)
        fitted = (weighted * w).sum(2) / norm.clamp(min=1e-30)
        consider(torch.where(norm > 0, fitted, best_scale), best_zero)
    return best_scale, best_zero


INTEGER = Grid("integer", plain, search, spacing, stored_in_float16, restored, divided)
