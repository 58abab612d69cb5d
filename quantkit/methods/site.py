# SPDX-License-Identifier: Apache-2.0
"""How the codes of one site are chosen: a pure function of its weights and statistics for each row of `table`.

rtn   nearest codes on a grid that just spans each group; needs no calibration
gptq  grid by weighted search, then error-compensating rounding
awq   the same after scaling the input channels, where an earlier op can absorb the scale
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.grids.registry import dequantize
from quantkit.hardware.batching import weights_at_once
from quantkit.hardware.matmul import product
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.methods import awq, gptq, rtn
from quantkit.methods.refine import refine
from quantkit.methods.table import Options
from quantkit.methods.tune import offsets
from quantkit.scheme import QuantizedTensor, Scheme, join_rows, map_rows, split_rows
from quantkit.stats import SiteStats, output_error, rescale_, rescale_drift_


@dataclass(frozen=True)
class SiteInput:
    """A site as a method sees it.

    weights: name -> [out, in], all reading the same inputs; schemes: name -> Scheme, or None to stay in 16 bit
    channel: int64 [in], the producer's channel behind each column, or None when no op can absorb a scale
    min_zero: the smallest zero point that the format stores safely
    factor: of the Gram matrix, where it is known already from another scheme; used by gptq, which scales nothing
    ranks: all of which have this site, and share the work
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme | None]
    stats: SiteStats | None
    channel: Tensor | None
    min_zero: int = 0
    factor: gptq.Factor | None = None
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class SiteResult:
    """quantized: name -> QuantizedTensor; scale: per producer channel, to divide it by, or None when nothing is folded;
    records: name -> what happened, for the report; offsets: name -> see `tune.offsets`, if the result is to be tuned.
    """

    quantized: dict[str, QuantizedTensor]
    scale: Tensor | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)


def round_to_nearest(site: SiteInput, options: Options) -> SiteResult:
    """Every group's grid spans its weights, every weight goes to the nearest code."""
    quantized, records = {}, {}
    for name, scheme in site.schemes.items():
        if scheme is not None:
            weight = site.weights[name]
            quantized[name] = rtn.quantize(weight, scheme, search=False, min_zero=site.min_zero)
            difference = dequantize(quantized[name]) - weight.float()
            records[name] = {"loss": _share(difference.square().sum(), weight.float().square().sum())}
    return SiteResult(quantized, None, records)


def compensate(site: SiteInput, options: Options) -> SiteResult:
    """GPTQ: see `gptq`."""
    assert site.stats is not None
    return _round(site.weights, site, site.stats, options, site.factor)


def scale_and_round(site: SiteInput, options: Options) -> SiteResult:
    """AWQ: see `awq`; then rounding as for GPTQ, or to nearest. Rescales the statistics in place."""
    assert site.stats is not None
    names = [name for name, scheme in site.schemes.items() if scheme is not None]
    if site.channel is None or not names:
        return _round(site.weights, site, site.stats, options)
    weights = [site.weights[name] for name in names]
    schemes = [scheme for scheme in site.schemes.values() if scheme is not None]
    search = awq.search_scale(
        weights, schemes, site.stats.gram, site.stats.abs_mean, site.channel, site.min_zero, site.ranks
    )
    columns = search.scale[site.channel]
    scaled = {name: weight.float() * columns for name, weight in site.weights.items()}
    rescale_(site.stats.gram, columns)
    rescale_drift_(site.stats, columns)
    result = _round(scaled, site, site.stats, options)
    for record in result.records.values():
        record["scale"] = search.kind
        record["scale_gain"] = 1 - search.error / search.unscaled_error if search.unscaled_error > 0 else 0.0
    return replace(result, scale=search.scale)


QUANTIZE: dict[str, Callable[[SiteInput, Options], SiteResult]] = {
    "rtn": round_to_nearest,
    "gptq": compensate,
    "awq": scale_and_round,
}


def _round(
    weights: Mapping[str, Tensor],
    site: SiteInput,
    stats: SiteStats,
    options: Options,
    factor: gptq.Factor | None = None,
) -> SiteResult:
    gram = stats.gram
    if factor is None and options.compensates:
        factor = gptq.factorize(gram, damp=options.damp, act_order=options.act_order)
    drift = stats.drift if factor is not None else None
    if factor is not None and drift is not None and not stats.projected:
        drift = gptq.times_inverse(drift, factor)
    at_once = max(1, weights_at_once(gram.device.type == "cuda") // len(gram))
    quantized, records = {}, {}
    starts: dict[str, Tensor] = {}
    for scheme in dict.fromkeys(site.schemes.values()):
        if scheme is None:
            continue
        names = [name for name in site.schemes if site.schemes[name] == scheme]
        rows = [len(weights[name]) for name in names]
        # Rows know nothing of each other: each rank takes some, and some at a time.
        share = site.ranks.rows(sum(rows))
        weight = torch.cat([weights[name].float() for name in names])[share]
        parts = weight.split(at_once)
        pulls = drift[share].split(at_once) if drift is not None and stats.projected else [drift] * len(parts)
        found = [
            _round_rows(part, pull, scheme, stats, factor, site.min_zero, options)
            for part, pull in zip(parts, pulls, strict=True)
        ]
        gather = site.ranks.gather
        together = map_rows(join_rows([part for part, _ in found]), gather)
        by_row = {key: gather(torch.cat([part[key] for _, part in found])).split(rows) for key in found[0][1]}
        by_name = split_rows(together, rows)
        for name, part, lost, whole in zip(names, by_name, by_row["error"], by_row["energy"], strict=True):
            quantized[name], records[name] = part, {"loss": _share(lost.sum(), whole.sum())}
            if factor is not None and factor.damp != options.damp:
                records[name]["damp_raised_to"] = factor.damp
        starts |= dict(zip(names, by_row.get("offsets", ()), strict=options.tune))
    in_order = [name for name in site.schemes if name in quantized]
    return SiteResult({n: quantized[n] for n in in_order}, None, {n: records[n] for n in in_order}, starts)


def _round_rows(
    weight: Tensor,
    drift: Tensor | None,
    scheme: Scheme,
    stats: SiteStats,
    factor: gptq.Factor | None,
    min_zero: int,
    options: Options,
) -> tuple[QuantizedTensor, dict[str, Tensor]]:
    """Round rows [out, in]; with them by row the squared error of the output, its energy, and the offsets to tune from.

    drift: where it is projected, that of the rows; else what `gptq.times_inverse` made of it
    """
    if factor is not None and drift is not None:
        if stats.projected:
            moved = gptq.times_inverse(drift, factor)
        else:
            moved = product(weight.masked_fill(factor.dead, 0), drift, exact=False)
        weight = weight.add(moved, alpha=options.correct)
    energy = stats.gram.diagonal()
    if factor is None:
        rounded = rtn.quantize(weight, scheme, energy=energy, min_zero=min_zero)
        error = output_error(dequantize(rounded) - weight, stats.gram, exact=False)
    else:
        once = gptq.quantize(weight, scheme, factor, energy=energy, min_zero=min_zero)
        rounded, error = refine(weight, once, stats.gram, damp=factor.damp, rounds=options.refine)
    by_row = {"error": error, "energy": output_error(weight, stats.gram, exact=False)}
    return rounded, by_row | ({"offsets": offsets(weight, rounded)} if options.tune else {})


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0
