# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight goes to the nearest point of a grid, with no regard to the others."""

from torch import Tensor

from quantkit.grids import registry
from quantkit.scheme import QuantizedTensor, Scheme


def quantize(
    weight: Tensor, scheme: Scheme, *, energy: Tensor | None = None, search: bool = True, min_zero: int = 0
) -> QuantizedTensor:
    """Round weight [out, in] to the nearest codes.

    With `search` the grid minimises the squared error weighted by energy [in] (see `grids`); without it the grid just
    spans each group, unless it is one that is always searched.
    """
    if search or registry.grid_of(scheme).searches:
        return registry.encode(weight, registry.search(weight, scheme, energy, min_zero))
    return registry.encode(weight, registry.plain(weight, scheme, min_zero))
