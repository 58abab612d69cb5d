# SPDX-License-Identifier: Apache-2.0
"""What calibration leaves behind for a site: enough to judge any rounding without running the layer again.

For inputs X [tokens, in_features] and a rounding Q of W, the squared error of the output is

    ||X W^T - X Q^T||^2 = tr((W - Q) H (W - Q)^T)        with the Gram matrix H = X^T X

so H serves the AWQ scale search, the range search and GPTQ alike (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978).

Where the original model's inputs X0 to the same site are known too, their drift D = (X0 - X)^T X says what part of the
original's output a weight that sees X can still bring back (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692). Only
W D is ever asked for, and where W has few rows it takes fewer products to sum up W (X0 - X)^T X. Where W X0^T is known,
from running the original, so is that: W X0^T X - W H, with the H of the same rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.hardware.matmul import accumulate_, accumulate_gram_, linear, mirror_, product, rounded, strips
from quantkit.hardware.ranks import ALONE, Ranks

ENOUGH_TOKENS = 65_536  # with which a Gram matrix is taken as it is,
ENOUGH_FOR_WIDTH = 8  # if there are so many for each input
SHRINKAGE = 4  # what fewer are shrunk by: times inputs over tokens, of the mean of the diagonal (LOG.md)


@dataclass
class SiteStats:
    """The inputs of a site, summed up.

    gram:     float32 [in_features, in_features], sum of x^T x
    abs_sum:  float32 [in_features], sum of |x|
    abs_max:  float32 [], the largest |x|
    tokens:   how many rows were added
    drift:    float32 [in_features, in_features], sum of (x0 - x)^T x, or None if the original's inputs were not seen;
              or [out_features, in_features], that multiplied by a weight; scaled up to all rows if x0 was seen of some
    projected: whether it is
    """

    gram: Tensor
    abs_sum: Tensor
    abs_max: Tensor
    tokens: int = 0
    drift: Tensor | None = None
    projected: bool = False

    @property
    def abs_mean(self) -> Tensor:
        return self.abs_sum / max(self.tokens, 1)


@dataclass(frozen=True)
class Projection:
    """What a drift is multiplied by while it is summed up.

    weight:  [out_features, in_features]
    applied: whether the originals that come in are outputs of this weight, not inputs
    """

    weight: Tensor
    applied: bool = False


def collect(
    inputs: Iterable[Tensor],
    in_features: int,
    device: torch.device,
    originals: Iterable[Tensor] | None = None,
    ranks: Ranks = ALONE,
    projection: Projection | None = None,
) -> SiteStats:
    """Sum up inputs [..., in_features] of any floating type, accumulating in float32.

    How the inputs are cut into tensors decides how the sums are split, and so their last bits.

    Args:
        originals: what the original model has in the place of the first of them, cut in the same way; the drift of
            those stands for that of all
        ranks: all of which have these inputs, and share the work
        projection: where only the drift times a weight is wanted
    """
    stats, rest_of_inputs = empty_stats(in_features, device), iter(inputs)
    if originals is not None:
        rows = in_features if projection is None else len(projection.weight)
        stats.drift = torch.zeros(rows, in_features, device=device)
        stats.projected = projection is not None
        rest = None
        for original, tensor in zip(originals, rest_of_inputs, strict=False):
            add_inputs(stats, tensor[: len(original)], original, ranks, projection)
            rest = tensor[len(original) :]
        paired_tokens = stats.tokens
        if projection is not None and projection.applied:
            _complete(stats.gram, ranks)
            for strip in _own_strips(stats.drift, ranks):
                stats.drift[strip].sub_(product(projection.weight[strip], stats.gram))
        _send(stats.drift, ranks)
        if rest is not None and len(rest):
            add_inputs(stats, rest, None, ranks)
    for tensor in rest_of_inputs:
        add_inputs(stats, tensor, None, ranks)
    _complete(stats.gram, ranks)
    if stats.drift is not None:
        stats.drift *= stats.tokens / paired_tokens
    return stats


def empty_stats(in_features: int, device: torch.device) -> SiteStats:
    """Nothing summed up yet."""
    return SiteStats(
        torch.zeros(in_features, in_features, device=device),
        torch.zeros(in_features, device=device),
        torch.zeros((), device=device),
    )


def add_inputs(
    stats: SiteStats,
    inputs: Tensor,
    original: Tensor | None = None,
    ranks: Ranks = ALONE,
    projection: Projection | None = None,
) -> None:
    """Add inputs [..., in_features] to the sums, in place; of the Gram matrix only one half, see `matmul.mirror_`.

    Args:
        ranks: that share the `matmul.strips` of the matrices
        projection: see `collect`, which subtracts the quantized model's part from what is summed up here if the
            projection is applied already
    """
    x = inputs.reshape(-1, inputs.shape[-1])
    magnitude = x.abs()
    stats.abs_sum += magnitude.sum(0, dtype=torch.float32)
    stats.abs_max = torch.maximum(stats.abs_max, magnitude.max().float())
    del magnitude
    accumulate_gram_(stats.gram, x, _own_strips(stats.gram, ranks))
    if stats.drift is not None and original is not None:
        applied = projection is not None and projection.applied
        moved = original.reshape(len(x), -1) if applied else original.reshape(x.shape) - x
        right = x if applied else rounded(x)  # the difference is small then
        for strip in _own_strips(stats.drift, ranks):
            if projection is None or applied:
                left = moved[:, strip]
            else:
                left = linear(moved, projection.weight[strip].to(x.dtype), exact=False)
            accumulate_(stats.drift[strip], left, right, exact=applied)
    stats.tokens += len(x)


class Sums:
    """Inputs that are summed up as they come, a fixed number of samples at once: memory decides no last bit."""

    def __init__(self, stats: SiteStats, samples: int) -> None:
        self._stats, self._samples = stats, samples
        self._rest: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Add inputs [samples, ..., in_features]."""
        self._rest.append(inputs)
        while sum(map(len, self._rest)) >= self._samples:
            together = torch.cat(self._rest)
            add_inputs(self._stats, together[: self._samples])
            self._rest = [together[self._samples :]] if len(together) > self._samples else []

    def finish(self) -> SiteStats:
        """The sums of all that was added."""
        if self._rest:
            add_inputs(self._stats, torch.cat(self._rest))
            self._rest = []
        mirror_(self._stats.gram)
        return self._stats


def _complete(gram: Tensor, ranks: Ranks) -> None:
    """Make all of a Gram matrix known to all ranks; more may be added to it afterwards."""
    _send(gram, ranks)
    mirror_(gram)


def _send(total: Tensor, ranks: Ranks) -> None:
    for number, strip in enumerate(strips(total)):
        ranks.send_(total[strip], ranks.owner(number))


def _own_strips(matrix: Tensor, ranks: Ranks) -> list[slice]:
    return [strip for number, strip in enumerate(strips(matrix)) if ranks.owner(number) == ranks.rank]


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


def shrink_(stats: SiteStats) -> SiteStats:
    """Shrink the Gram matrix of too few tokens towards a multiple of the identity, in place (Ledoit and Wolf, 2004).

    The matrix of n tokens is off by about sqrt(in_features / n). Rounding that trusts it makes up for errors in
    directions that other text does not have, and spends the grid on columns that few tokens happened to use.
    """
    width = len(stats.gram)
    if stats.tokens < max(ENOUGH_TOKENS, ENOUGH_FOR_WIDTH * width):
        ridge = SHRINKAGE * width / max(stats.tokens, 1)
        stats.gram.diagonal().add_(ridge * stats.gram.diagonal().mean())
    return stats


def rescale_(gram: Tensor, scale: Tensor) -> Tensor:
    """Make it the Gram matrix of x / scale, in place: D^-1 H D^-1 with D = diag(scale [in_features])."""
    inverse = scale.float().reciprocal()
    return gram.mul_(inverse.unsqueeze(0)).mul_(inverse.unsqueeze(1))


def rescale_drift_(stats: SiteStats, scale: Tensor) -> Tensor | None:
    """Make the drift that of x / scale, in place; where a weight stands before it, the weight is taken times scale."""
    if stats.drift is None:
        return None
    return stats.drift.mul_(scale.float().reciprocal()) if stats.projected else rescale_(stats.drift, scale)


def output_error(difference: Tensor, gram: Tensor, *, exact: bool = True) -> Tensor:
    """tr(D H D^T) per output row, float32 [out], for D = W - Q [out, in]: the squared error of the output.

    gram: float32, or of 16 bit where a GPU multiplies that faster; exact: see `matmul`; False is enough to compare
    roundings.
    """
    d = difference.to(gram.dtype)
    return product(d, gram, exact=exact).mul_(d).sum(1)
