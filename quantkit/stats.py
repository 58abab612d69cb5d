# SPDX-License-Identifier: Apache-2.0
"""What calibration leaves behind for a site: enough to judge any rounding without running the layer again.

For inputs X [tokens, in_features] and a rounding Q of W, the squared error of the output is

    ||X W^T - X Q^T||^2 = tr((W - Q) H (W - Q)^T)        with the Gram matrix H = X^T X

so H serves the AWQ scale search, the range search and GPTQ alike (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978).

Where the original model's inputs X0 to the same site are known too, their drift D = (X0 - X)^T X says what part of the
original's output a weight that sees X can still bring back (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.products import accumulate_, accumulate_gram_, mirror_, product, strips
from quantkit.ranks import ALONE, Ranks


@dataclass
class SiteStats:
    """The inputs of a site, summed up.

    gram:     float32 [in_features, in_features], sum of x^T x
    abs_sum:  float32 [in_features], sum of |x|
    abs_max:  float32 [], the largest |x|
    tokens:   how many rows were added
    drift:    float32 [in_features, in_features], sum of (x0 - x)^T x, or None if the original's inputs were not seen
    """

    gram: Tensor
    abs_sum: Tensor
    abs_max: Tensor
    tokens: int = 0
    drift: Tensor | None = None

    @property
    def abs_mean(self) -> Tensor:
        return self.abs_sum / max(self.tokens, 1)


def collect(
    inputs: Iterable[Tensor],
    in_features: int,
    device: torch.device,
    originals: Iterable[Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> SiteStats:
    """Sum up inputs [..., in_features] of any floating type, accumulating in float32.

    originals: what the original model has in their place, cut in the same way. How the inputs are cut into tensors
    decides how the sums are split, and so their last bits. ranks: all of which have these inputs, and share the work.
    """
    stats = empty_stats(in_features, device)
    if originals is not None:
        stats.drift = torch.zeros(in_features, in_features, device=device)
    own = [strip for number, strip in enumerate(strips(stats.gram)) if ranks.owner(number) == ranks.rank]
    for tensor, original in zip(inputs, repeat(None) if originals is None else originals, strict=originals is not None):
        add_inputs(stats, tensor, original, own)
    for number, strip in enumerate(strips(stats.gram)):
        for total in (stats.gram, stats.drift):
            if total is not None:
                ranks.send_(total[strip], ranks.owner(number))
    mirror_(stats.gram)
    return stats


def empty_stats(in_features: int, device: torch.device) -> SiteStats:
    """Nothing summed up yet."""
    return SiteStats(
        torch.zeros(in_features, in_features, device=device),
        torch.zeros(in_features, device=device),
        torch.zeros((), device=device),
    )


def add_inputs(
    stats: SiteStats, inputs: Tensor, original: Tensor | None = None, rows: Sequence[slice] | None = None
) -> None:
    """Add inputs [..., in_features] to the sums, in place; of the Gram matrix only one half, see `products.mirror_`.

    rows: the `products.strips` to do of the matrices, if not all
    """
    x = inputs.reshape(-1, inputs.shape[-1])
    magnitude = x.abs()
    stats.abs_sum += magnitude.sum(0, dtype=torch.float32)
    stats.abs_max = torch.maximum(stats.abs_max, magnitude.max().float())
    del magnitude
    rows = strips(stats.gram) if rows is None else rows
    accumulate_gram_(stats.gram, x, rows)
    if stats.drift is not None and original is not None:
        difference = (original.reshape(x.shape).float() - x.float()).to(x.dtype)
        for strip in rows:
            accumulate_(stats.drift[strip], difference[:, strip], x)
    stats.tokens += len(x)


def require_finite_stats(stats: SiteStats, name: str) -> None:
    """Stop before a broken activation spreads.

    Raises:
        NumericsError: naming the site whose inputs are not finite, or overflowed in the Gram matrix.
    """
    if not bool(torch.isfinite(stats.abs_max)):
        raise NumericsError(
            f"{name}: its calibration inputs are not finite (NaN or infinity); check the model's weights"
        )
    if not bool(torch.isfinite(stats.gram.diagonal()).all()):
        largest = stats.abs_max.item()
        raise NumericsError(
            f"{name}: its Gram matrix overflowed float32 (largest input {largest:.3g}); check the model's weights"
        )


def rescale_(gram: Tensor, scale: Tensor) -> Tensor:
    """Make it the Gram matrix of x / scale, in place: D^-1 H D^-1 with D = diag(scale [in_features])."""
    inverse = scale.float().reciprocal()
    return gram.mul_(inverse.unsqueeze(0)).mul_(inverse.unsqueeze(1))


def output_error(difference: Tensor, gram: Tensor, *, exact: bool = True) -> Tensor:
    """tr(D H D^T) per output row, float32 [out], for D = W - Q [out, in]: the squared error of the output.

    exact: see `products`; False is enough to compare roundings.
    """
    d = difference.float()
    return product(d, gram, exact=exact).mul_(d).sum(1)
