# SPDX-License-Identifier: Apache-2.0
"""AWQ (arXiv 2306.00978): scale the input channels that matter up before rounding, and undo it in the previous op.

For a scale s > 0 per input channel, W diag(s) applied to x / s is the same function, but the channels with a large s
are rounded more finely. The division by s is folded into the op that produces x, so the model is unchanged. Every
candidate s is judged by the error it leaves in the site's outputs, which needs only the Gram matrix H of x:

    sum over linears of tr((W D - Q(W D)) D^-1 H D^-1 (W D - Q(W D))^T)          D = diag(s)

Candidates: s = 1, powers of the mean |x|, and the ratio form mean|x|^a / mean|w|^(1-a). Left out on purpose: running
the module for every candidate (H gives each linear's error exactly; only what comes after the linear is not seen).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import kernels
from quantkit.grids.registry import dequantize, encode, plain
from quantkit.hardware.matmul import fast_16bit
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.scheme import Scheme
from quantkit.stats import output_error

POWERS = tuple(i / 20 for i in range(1, 20))
RATIO_POWERS = tuple(i / 10 for i in range(10))
AT_ONCE_GPU = 1 << 27  # scaled weights in temporaries at a time; on a CPU one candidate's are enough
ROWS_JUDGED = 512  # rows of a linear that speak for all of it: a scale belongs to columns, and every row costs in^2


@dataclass(frozen=True)
class ScaleSearch:
    """The best scale [channels] of a producer, what kind it is, its error, and the error of s = 1."""

    scale: Tensor
    kind: str
    error: float
    unscaled_error: float


def candidate_scales(abs_mean: Tensor, weight_mean: Tensor) -> dict[str, Tensor]:
    """The scales [channels] to try by name, first s = 1; each is centred so that sqrt(max * min) = 1."""
    x = abs_mean.float().clamp(min=1e-4 * float(abs_mean.mean()) + 1e-12)
    raw = {f"x^{power:g}": x**power for power in POWERS}
    raw |= {f"x^{p:g}/w^{1 - p:.1g}": (x**p / (weight_mean ** (1 - p) + 1e-4)).clamp(min=1e-4) for p in RATIO_POWERS}
    return {"1": torch.ones_like(x)} | {name: _bounded(s / (s.max() * s.min()).sqrt()) for name, s in raw.items()}


def _bounded(scale: Tensor) -> Tensor:
    # The producer is stored in float16 after division by s: a wider spread would push it out of float16's range.
    return scale.clamp(2.0**-10, 2.0**10)


def relative_magnitude(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> Tensor:
    """Mean over rows of |W| / (largest |W| of its group): how much of its group's range each column uses; [in]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, scheme in zip(weights, schemes, strict=True):
        magnitude = weight.float().abs().unflatten(1, (scheme.groups(weight.shape[1]), -1))
        total += (magnitude / magnitude.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1).sum(0)
    return total / sum(len(weight) for weight in weights)


def site_errors(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], gram: Tensor, scales: Tensor, min_zero: int = 0
) -> Tensor:
    """The squared output error of all the site's linears when rounded to nearest after scaling, for each of the scales.

    scales: [candidates, in] -> float64 [candidates]
    """
    totals = torch.zeros(len(scales), dtype=torch.float64, device=gram.device)
    judging = gram.bfloat16() if fast_16bit(gram) else gram  # once for all
    for weight, scheme in zip(weights, schemes, strict=True):
        fits = kernels.usable(weight) and kernels.rounds(scheme, weight.shape[1])
        differences = kernels.scaled_differences if fits else scaled_differences_by_torch
        at_once = 1 if gram.device.type == "cpu" else max(1, AT_ONCE_GPU // weight.numel())
        for part, total in zip(scales.split(at_once), totals.split(at_once), strict=True):
            # x / s meets the error as x meets error / s
            difference = differences(weight, part, scheme, min_zero).flatten(0, 1)
            error = output_error(difference, judging, exact=False)
            total += error.unflatten(0, (len(part), -1)).double().sum(1)
    return totals


def scaled_differences_by_torch(weight: Tensor, scales: Tensor, scheme: Scheme, min_zero: int) -> Tensor:
    """(Q(W D) - W D) D^-1, Q to nearest on the plain grid: weight [out, in], scales [n, in] -> float32 [n, out, in].

    It is the oracle of `kernels.scaled_differences`, and what runs without it.
    """
    scaled = (weight.float() * scales.unsqueeze(1)).flatten(0, 1)
    rounded = dequantize(encode(scaled, plain(scaled, scheme, min_zero)))
    difference: Tensor = rounded.sub_(scaled).unflatten(0, (len(scales), -1))
    return difference.div_(scales.unsqueeze(1))


def search_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    gram: Tensor,
    abs_mean: Tensor,
    channel: Tensor,
    min_zero: int = 0,
    ranks: Ranks = ALONE,
) -> ScaleSearch:
    """The best scale of a site's producer.

    weights: the site's linears [out_i, in]; gram [in, in]; abs_mean [in];
    channel: int64 [in], the producer's channel that feeds each input column (several columns share one when an
    attention value head serves several query heads).
    """
    channels = int(channel.max()) + 1
    together = torch.argsort(channel, stable=True).view(channels, -1)  # every channel feeds equally many columns

    def per_channel(x: Tensor) -> Tensor:
        return x.float()[together].mean(1)

    candidates = candidate_scales(per_channel(abs_mean), per_channel(relative_magnitude(weights, schemes)))
    stride = max(1, max(map(len, weights)) // ROWS_JUDGED)
    judged = [weight[::stride] for weight in weights]
    scales = torch.stack([scale[channel] for scale in candidates.values()])[ranks.rows(len(candidates))]
    found = ranks.gather(site_errors(judged, schemes, gram, scales, min_zero)).tolist()
    errors = dict(zip(candidates, found, strict=True))
    best = min(errors, key=errors.__getitem__)
    return ScaleSearch(candidates[best], best, errors[best], errors["1"])
