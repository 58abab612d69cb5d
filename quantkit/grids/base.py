# SPDX-License-Identifier: Apache-2.0
"""What a grid is. A row of each weight is cut into groups of columns, and every group has a scale of its own:

    w = scale * level - low

Levels are whole numbers from -zero to max_code - zero, or the entries of a table that the codes look up. Everything
that GPTQ, refinement, tuning and AWQ need follows from this and from how a grid stores its scales: they ask the grid,
and know no number kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.scheme import QuantizedTensor, Scheme

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
ROWS_AT_ONCE = 1 << 18  # weights in temporaries at a time on a CPU, where they stay in its cache
ROWS_AT_ONCE_GPU = 1 << 25  # the result does not depend on it


@dataclass(frozen=True)
class Parameters:
    """The quantization parameters of a weight [out, in]: all that a `QuantizedTensor` holds beside its codes.

    scales, zeros: [out, groups], as the grid stores them; outer: what scales of a second level are counted in, by name,
    [out, any number of columns]
    """

    scheme: Scheme
    scales: Tensor
    zeros: Tensor
    outer: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Spacing:
    """What parameters stand for, float32 [out, groups] each.

    scales: the distance of neighbouring levels; zeros: the code of level 0; lows: what is subtracted, or None;
    units: what stored scales are whole multiples of, or None where any scale can be stored
    """

    scales: Tensor
    zeros: Tensor
    lows: Tensor | None = None
    units: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A kind of numbers. Weights are [out, in]; `min_zero` is the smallest zero point that a format stores safely.

    plain:    (weight, scheme, min_zero) -> Parameters that span each group, found quickly
    search:   (weight, scheme, energy, min_zero) -> Parameters with the least squared error, each column weighted by its
              energy [in] (diag of the Gram matrix; None weighs all alike)
    spacing:  Parameters -> Spacing
    store:    (scales, units) -> the nearest scales that can be stored, float32; units: as in Spacing
    restored: (Parameters, scales float32 [out, groups]) -> Parameters with these scales
    divided:  (Parameters, divisors float32 [out]) -> Parameters of the weight with its rows divided; None: not possible
    values:   the value of each code; None: codes are whole numbers that count from the zero point
    searches: whether rounding to nearest searches too; otherwise it spans each group, as other tools do
    """

    name: str
    plain: Callable[[Tensor, Scheme, int], Parameters]
    search: Callable[[Tensor, Scheme, Tensor | None, int], Parameters]
    spacing: Callable[[Parameters], Spacing]
    store: Callable[[Tensor, Tensor | None], Tensor]
    restored: Callable[[Parameters, Tensor], Parameters]
    divided: Callable[[Parameters, Tensor], Parameters] | None = None
    values: tuple[float, ...] | None = None
    searches: bool = False


@dataclass(frozen=True)
class Levels:
    """Which levels there are. table: the values of all codes in rising order; None: whole numbers less a zero point."""

    max_code: int
    table: Tensor | None = None

    def nearest(self, positions: Tensor, zeros: Tensor) -> Tensor:
        """The level nearest to each position (a weight over its scale); zeros must broadcast. Overwrites positions."""
        if self.table is None:
            return torch.clamp(positions.round_(), -zeros, self.max_code - zeros, out=positions)
        return positions.copy_(self.table[torch.bucketize(positions, self.middles)])

    def origin(self, zeros: Tensor) -> Tensor:
        """What positions are counted from: added to levels, so that whole-number positions are codes."""
        return zeros if self.table is None else torch.zeros_like(zeros)

    @property
    def ends(self) -> tuple[float, float]:
        """The positions, counted from the origin, beyond which the last level is not the nearest any more."""
        if self.table is None:
            return -0.5, self.max_code + 0.5
        return float(self.table[0]) - self.cell / 2, float(self.table[-1]) + self.cell / 2

    @property
    def cell(self) -> float:
        """The smallest distance of two levels."""
        return 1.0 if self.table is None else float((self.table[1:] - self.table[:-1]).min())

    @property
    def middles(self) -> Tensor:
        """Where the nearest level changes."""
        assert self.table is not None
        return (self.table[1:] + self.table[:-1]) / 2


@dataclass(frozen=True)
class Lattice:
    """The values that a weight may take, with its columns as rows, as the loop over columns reads them.

    scales, zeros, units: as in `Spacing`, but [groups, out] and scales never 0; store: of the grid
    """

    scales: Tensor
    zeros: Tensor
    levels: Levels
    store: Callable[[Tensor, Tensor | None], Tensor]
    units: Tensor | None = None

    def part(self, groups: slice) -> "Lattice":
        """Some of the groups. Scales are views, so that they can be changed in place."""
        units = None if self.units is None else self.units[groups]
        return replace(self, scales=self.scales[groups], zeros=self.zeros[groups], units=units)


def to_float16(scales: Tensor) -> Tensor:
    """Round scales to what is stored, keeping their sign and never reaching zero.

    Raises:
        NumericsError: a scale is beyond float16.
    """
    if not bool((scales.abs() <= 65504).all()):
        raise NumericsError("a group's scale is beyond float16 (65504): the weights are too large or not finite")
    return nearest_float16(scales)


def nearest_float16(scales: Tensor) -> Tensor:
    """The same without looking at the values, for which a GPU would have to be waited for: infinite beyond float16."""
    sign = torch.where(scales < 0, -1.0, 1.0)
    return (scales.abs().clamp(min=SMALLEST_SCALE) * sign).to(torch.float16)


def stored_in_float16(scales: Tensor, units: Tensor | None) -> Tensor:
    """`Grid.store` of grids whose scales are float16."""
    return nearest_float16(scales).float()


def divisible(scales: Tensor) -> Tensor:
    """Scales to divide by: those of groups that are all zero are the smallest there is."""
    return torch.where(scales == 0, SMALLEST_SCALE, scales)


def relative_energy(energy: Tensor | None, weight: Tensor) -> Tensor:
    """The importance of each column [in]: its energy over the mean.

    A little of the mean is added, so that dead columns have some say in the range that they must live in.
    """
    energy = torch.ones(weight.shape[1], device=weight.device) if energy is None else energy.float()
    return energy / energy.mean().clamp(min=1e-30) + 1e-4


def parameters_of(quantized: QuantizedTensor) -> Parameters:
    """What a quantized tensor holds beside its codes."""
    return Parameters(quantized.scheme, quantized.scales, quantized.zeros, quantized.outer)


def with_codes(parameters: Parameters, codes: Tensor) -> QuantizedTensor:
    """A quantized tensor of these parameters."""
    return QuantizedTensor(codes, parameters.scales, parameters.zeros, parameters.scheme, outer=parameters.outer)
