# SPDX-License-Identifier: Apache-2.0
"""The grids by name, and what is the same for all of them: codes from weights, weights from codes."""

import torch
from torch import Tensor

from quantkit.grids import two_level
from quantkit.grids.base import Grid, Lattice, Levels, Parameters, divisible, parameters_of, with_codes
from quantkit.grids.integer import INTEGER
from quantkit.scheme import QuantizedTensor, Scheme

GRIDS: dict[str, Grid] = {grid.name: grid for grid in (INTEGER, *two_level.GRIDS)}


def grid_of(scheme: Scheme) -> Grid:
    """The grid of a scheme."""
    return GRIDS[scheme.grid]


def plain(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> Parameters:
    """Parameters that just span each group of weight [out, in]."""
    return grid_of(scheme).plain(weight, scheme, min_zero)


def search(weight: Tensor, scheme: Scheme, energy: Tensor | None = None, min_zero: int = 0) -> Parameters:
    """Parameters with the least squared error, each column weighted by its energy [in]; see `Grid.search`."""
    return grid_of(scheme).search(weight, scheme, energy, min_zero)


def encode(weight: Tensor, parameters: Parameters) -> QuantizedTensor:
    """Round each weight [out, in] to the nearest value that the parameters allow."""
    grid = grid_of(parameters.scheme)
    spacing = grid.spacing(parameters)
    grouped = weight.float().unflatten(1, (spacing.scales.shape[1], -1))  # [out, groups, columns]
    if spacing.lows is not None:
        grouped = grouped + spacing.lows.unsqueeze(2)
    zeros = spacing.zeros.unsqueeze(2)
    positions = grouped / divisible(spacing.scales).unsqueeze(2)
    levels = levels_of(grid, parameters.scheme, weight.device).nearest(positions, zeros)
    return with_codes(parameters, codes_of(grid, levels, zeros).flatten(1))


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] that the codes stand for, computed in float32; dtype None keeps that."""
    grid = grid_of(quantized.scheme)
    spacing = grid.spacing(parameters_of(quantized))
    if quantized.g_idx is not None:
        group = quantized.g_idx.long()
        levels = quantized.codes.float() - spacing.zeros[:, group]
        return (levels * spacing.scales[:, group]).to(dtype or levels.dtype)
    codes: Tensor = quantized.codes.unflatten(1, (spacing.scales.shape[1], -1))
    weight = values(grid, codes, spacing.zeros.unsqueeze(2)) * spacing.scales.unsqueeze(2)
    if spacing.lows is not None:
        weight = weight.sub_(spacing.lows.unsqueeze(2))
    return weight.flatten(1).to(dtype or weight.dtype)


def columns_of(quantized: QuantizedTensor) -> tuple[Lattice, Tensor, Tensor | None]:
    """A quantized tensor with its columns as rows: lattice, levels float32 [in, out], and lows [in, out] or None."""
    lattice, lows = lattice_of(parameters_of(quantized))
    columns = quantized.in_features // len(lattice.scales)
    grid = grid_of(quantized.scheme)
    zeros = lattice.zeros.repeat_interleave(columns, 0)
    levels = values(grid, quantized.codes.T.contiguous(), zeros)
    return lattice, levels, None if lows is None else lows.repeat_interleave(columns, 0)


def lattice_of(parameters: Parameters) -> tuple[Lattice, Tensor | None]:
    """The lattice of the parameters, and the lows [groups, out] that are subtracted from its values, or None."""
    grid = grid_of(parameters.scheme)
    spacing = grid.spacing(parameters)
    scales, zeros = divisible(spacing.scales.T.contiguous()), spacing.zeros.T.contiguous()
    levels = levels_of(grid, parameters.scheme, scales.device)
    units = None if spacing.units is None else spacing.units.T.contiguous()
    return Lattice(scales, zeros, levels, grid.store, units), None if spacing.lows is None else spacing.lows.T


def from_columns(parameters: Parameters, lattice: Lattice, levels: Tensor) -> QuantizedTensor:
    """The quantized tensor with the lattice's scales and these levels float32 [in, out]. Overwrites levels."""
    grid = grid_of(parameters.scheme)
    zeros = lattice.zeros.repeat_interleave(len(levels) // len(lattice.zeros), 0)
    codes = codes_of(grid, levels, zeros).T.contiguous()
    return with_codes(grid.restored(parameters, lattice.scales.T), codes)


def divide_rows(quantized: QuantizedTensor, divisors: Tensor) -> QuantizedTensor:
    """The tensor with the rows of its weight divided [out]; its codes stay. For grids that have `divided`."""
    divided = grid_of(quantized.scheme).divided
    assert divided is not None
    return with_codes(divided(parameters_of(quantized), divisors), quantized.codes)


def levels_of(grid: Grid, scheme: Scheme, device: torch.device) -> Levels:
    """The levels of a grid on a device."""
    if grid.values is None:
        return Levels(scheme.max_code)
    return Levels(len(grid.values) - 1, torch.tensor(sorted(set(grid.values)), device=device))


def values(grid: Grid, codes: Tensor, zeros: Tensor) -> Tensor:
    """Levels, float32, of codes."""
    if grid.values is None:
        return codes.float().sub_(zeros)
    return torch.tensor(grid.values, device=codes.device)[codes.long()]


def codes_of(grid: Grid, levels: Tensor, zeros: Tensor) -> Tensor:
    """Codes, uint8, of levels. Overwrites levels."""
    if grid.values is None:
        return levels.add_(zeros).to(torch.uint8)
    rising = sorted(set(grid.values))
    code = torch.tensor([grid.values.index(value) for value in rising], dtype=torch.uint8, device=levels.device)
    return code[torch.searchsorted(torch.tensor(rising, device=levels.device), levels.contiguous())]
