# SPDX-License-Identifier: Apache-2.0
"""Experts that have seen too few calibration tokens to be rounded by these alone.

With fewer tokens than inputs a Gram matrix says nothing of most directions, and with none it is zero: rounding by it
would ruin the expert for every other text. So the expert leans on its layer: what all tokens of the layer would give it
to read counts for as much as `PRIOR` tokens for each input. Whether that is better than rounding to nearest is seen on
tokens that are kept back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantkit.grids.registry import dequantize
from quantkit.methods.site import SiteInput, SiteResult, round_to_nearest
from quantkit.methods.table import Options
from quantkit.methods.tune import offsets
from quantkit.stats import SiteStats, output_error, shrink_

ENOUGH = 2  # tokens for each input with which an expert speaks for itself
PRIOR = 0.25  # tokens for each input that the layer's count for
KEPT_BACK = 4  # one token in so many judges

LAYER, NEAREST = "layer", "nearest"


@dataclass(frozen=True)
class Evidence:
    """What an expert has read, and what it would if all tokens of the layer came to it; each in two parts."""

    own: SiteStats
    own_kept_back: SiteStats
    layer: SiteStats
    layer_kept_back: SiteStats


def is_starved(tokens: int, in_features: int) -> bool:
    """Whether so many tokens are too few."""
    return tokens < ENOUGH * in_features


def round_starved(
    quantize: Callable[[SiteInput, Options], SiteResult], site: SiteInput, options: Options, evidence: Evidence
) -> SiteResult:
    """Quantize a site of a starved expert by a method that leans on the layer, or to nearest, whichever is better."""
    judge = _blended(evidence.own_kept_back, evidence.layer_kept_back)
    nearest = round_to_nearest(site, options)
    leaning = quantize(replace(site, stats=_blended(evidence.own, evidence.layer)), options)
    if _error(site, leaning, judge) < _error(site, nearest, judge):
        own = _sum(evidence.own, evidence.own_kept_back)
        layer = _sum(evidence.layer, evidence.layer_kept_back)
        result, fallback = quantize(replace(site, stats=_blended(own, layer)), options), LAYER
    else:
        starts = {n: offsets(site.weights[n].float(), q) for n, q in nearest.quantized.items() if options.tune}
        result, fallback = replace(nearest, offsets=starts), NEAREST
    return replace(result, records={name: row | {"fallback": fallback} for name, row in result.records.items()})


def _error(site: SiteInput, result: SiteResult, judge: SiteStats) -> float:
    """The squared error of the outputs for what the judge has read."""
    total = 0.0
    for name, quantized in result.quantized.items():
        weight = dequantize(quantized)
        if result.scale is not None and site.channel is not None:
            weight = weight / result.scale[site.channel]
        total += float(output_error(weight - site.weights[name].float(), judge.gram, exact=False).sum())
    return total


def _blended(own: SiteStats, layer: SiteStats) -> SiteStats:
    """The expert's sums, and the layer's as if of `PRIOR` tokens for each input; shrunk by what both have seen."""
    share = PRIOR * len(own.gram) / max(layer.tokens, 1)
    gram, abs_sum = own.gram + share * layer.gram, own.abs_sum + share * layer.abs_sum
    return shrink_(SiteStats(gram, abs_sum, torch.maximum(own.abs_max, layer.abs_max), own.tokens + layer.tokens))


def _sum(first: SiteStats, second: SiteStats) -> SiteStats:
    return SiteStats(
        first.gram + second.gram,
        first.abs_sum + second.abs_sum,
        torch.maximum(first.abs_max, second.abs_max),
        first.tokens + second.tokens,
    )
