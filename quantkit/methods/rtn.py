# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight goes to the nearest point of a grid, with no regard to the others."""

from torch import Tensor

from quantkit.methods.grid import plain_grid, search_grid
from quantkit.scheme import QuantizedTensor, Scheme, encode


def quantize(
    weight: Tensor, scheme: Scheme, *, energy: Tensor | None = None, search: bool = True, min_zero: int = 0
) -> QuantizedTensor:
    """Round weight [out, in] to the nearest codes.

    With `search` the grid minimises the squared error weighted by energy [in] (see `grid`); without it the grid just
    spans each group.
    """
    scales, zeros = search_grid(weight, scheme, energy, min_zero) if search else plain_grid(weight, scheme, min_zero)
    return QuantizedTensor(encode(weight, scales, zeros, scheme), scales, zeros, scheme)
