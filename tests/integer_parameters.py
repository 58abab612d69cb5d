# SPDX-License-Identifier: Apache-2.0
"""Integer grids as scales and zero points, which is how the oracles of the tests think of them."""

from torch import Tensor

from quantkit.grids import integer, registry
from quantkit.grids.base import Lattice, Levels, Parameters, stored_in_float16
from quantkit.scheme import Scheme


def plain_grid(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Scales and zero points that span each group."""
    parameters = integer.plain(weight, scheme, min_zero)
    return parameters.scales, parameters.zeros


def search_grid(
    weight: Tensor, scheme: Scheme, energy: Tensor | None = None, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with the least weighted error."""
    parameters = integer.search(weight, scheme, energy, min_zero)
    return parameters.scales, parameters.zeros


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """The nearest codes."""
    return registry.encode(weight, Parameters(scheme, scales, zeros)).codes


def lattice(scales: Tensor, zeros: Tensor, max_code: int) -> Lattice:
    """Scales and zero points, float32 [groups, out], as the loop over columns reads them."""
    return Lattice(scales, zeros, Levels(max_code), stored_in_float16)
