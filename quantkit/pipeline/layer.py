# SPDX-License-Identifier: Apache-2.0
"""One layer: site by site its inputs are summed up, its weights rounded, and what was rounded is put in their place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.dtypes import to_stored
from quantkit.errors import InputError, NumericsError, SchemeError
from quantkit.formats.names import expert_of
from quantkit.grids.registry import dequantize, divide_rows
from quantkit.hardware.batching import samples_per_sum
from quantkit.hardware.matmul import fast_bfloat16
from quantkit.methods.gptq import Factor
from quantkit.methods.site import QUANTIZE, SiteInput, SiteResult
from quantkit.methods.starved import round_starved
from quantkit.methods.table import METHODS
from quantkit.model.family import Fold, Site
from quantkit.model.sites import divided, fold_channels
from quantkit.model.streaming import assign
from quantkit.pipeline.activations import regrouped
from quantkit.pipeline.forward import Layer
from quantkit.pipeline.job import Job
from quantkit.pipeline.mixtures import Routed, expert_stats, route
from quantkit.pipeline.site_inputs import Passage, forget, inputs_of
from quantkit.plan import LinearPlan
from quantkit.scheme import QuantizedTensor
from quantkit.stats import Projection, SiteStats, collect, require_finite_stats, shrink_


@dataclass(frozen=True)
class Folded:
    """A fold that was used: the scale [channels] of its producer; channel: int64 [in], see `SiteInput`."""

    fold: Fold
    scale: Tensor
    channel: Tensor


@dataclass
class LayerResult:
    """A quantized layer: names local to it; `changed` holds in float32 what a fold changed and is not quantized;
    offsets: see `tune`; folds: see `folded`.
    """

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    folds: list[Folded] = field(default_factory=list)


def quantize_layer(
    job: Job,
    layer: Layer,
    calibration: Passage | None,
    original: Passage | None = None,
    observed: Sequence[SiteStats | None] | None = None,
    factors: Sequence[Factor | None] | None = None,
) -> LayerResult:
    """Quantize a layer site by site; the inputs of a site come from the sites before it, quantized.

    calibration: the calibration samples in this layer; original: the first of them in that of the original model
    observed, factors: the statistics of each site, and the factors of their Gram matrices, where known already
    """
    linears = job.plan.layer(layer.index)
    result = LayerResult()
    last = _last_calibrated(job, layer.sites, linears)
    rounded = {f"{name}.weight" for name, linear in linears.items() if linear.scheme is not None}
    rest = {name: tensor for name, tensor in layer.source.items() if name not in rounded}
    layer.load({name: to_stored(f"{layer.name}.{name}", tensor) for name, tensor in rest.items()})
    routed: Routed | None = None
    for number, site in enumerate(layer.sites):
        if all(linears[name].scheme is None for name in site.linears):
            continue
        method = job.method_of(linears[site.linears[0]])
        name = f"{layer.name}.{site.linears[0]}"
        stats = None if observed is None else observed[number]
        expert = expert_of(site.linears[0])
        evidence = None
        if stats is None and calibration is not None and METHODS[method].calibrates:
            layer.progress.stage(f"calibrate {kinds(site)}")
            if expert is None:
                stats = _collect(site, calibration, original, last=site is last)
            else:
                routed = routed if routed and routed.block == expert[0] else route(calibration, original, expert[0])
                stats, evidence = expert_stats(routed, site)
            require_finite_stats(stats, name)
        layer.progress.stage(f"quantize {kinds(site)}")
        again = any(used.fold == site.fold for used in result.folds)  # another site has scaled what this one reads
        channel = None if again else fold_channels(layer.runtime.model, layer.index, site.fold)
        inputs = _site_input(job, layer, site, stats, channel)
        if factors is not None:
            inputs = replace(inputs, factor=factors[number])
        try:
            if evidence is None:
                outcome = QUANTIZE[method](inputs, job.options)
            else:
                outcome = round_starved(QUANTIZE[method], inputs, job.options, evidence)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        if expert is not None and stats is not None:
            rows = {local: row | {"tokens": stats.tokens} for local, row in outcome.records.items()}
            outcome = replace(outcome, records=rows)
        settle = job.plan.format.settle
        outcome = replace(outcome, quantized={local: settle(q) for local, q in outcome.quantized.items()})
        if outcome.scale is not None and channel is not None and site.fold is not None:
            used = Folded(site.fold, outcome.scale, channel.to(layer.runtime.device))
            _fold(layer.module, used, outcome.quantized.keys(), result, settle)
            result.folds.append(used)
            if calibration is not None:
                forget(calibration, site)
        result.quantized |= outcome.quantized
        result.offsets |= outcome.offsets
        assign_float(layer.module, {f"{local}.weight": dequantize(q) for local, q in outcome.quantized.items()})
        result.records += records_of(job, outcome, linears)
    return result


def require_sites(job: Job, sites: Sequence[Sequence[Site]]) -> None:
    """Refuse what sites do not allow.

    sites: of each layer

    Raises:
        SchemeError: linears that read the same input with different methods; one to be quantized that is in no site.
        InputError: see `require_no_experts`.
    """
    if job.inputs == "original":
        require_no_experts(sites, "calibration on the original's inputs (--inputs original, sweep)")
    if job.runtime.ranks.size > 1:
        require_no_experts(sites, "a run by several processes")
    for index, of_layer in enumerate(sites):
        linears = job.plan.layer(index)
        for site in of_layer:
            methods = {job.method_of(linears[name]) for name in site.linears}
            if len(methods) > 1:
                names = ", ".join(linears[name].name for name in site.linears)
                raise SchemeError(
                    f"{names} read the same input: give them one method, got {', '.join(sorted(methods))}"
                )
        known = {name for site in of_layer for name in site.linears}
        for local, linear in linears.items():
            if local not in known and linear.scheme is not None:
                raise SchemeError(
                    f"{linear.name}: its weight is used without running it, so what it reads cannot be seen; keep it "
                    f"in 16 bit by a rule of a recipe (kind: {local.rpartition('.')[2]}, keep: 16bit)"
                )


def require_no_experts(sites: Sequence[Sequence[Site]], what: str) -> None:
    """Refuse mixtures of experts where they cannot be yet.

    Raises:
        InputError: there is one.
    """
    if any(expert_of(site.linears[0]) for of_layer in sites for site in of_layer):
        raise InputError(f"{what} does not take mixtures of experts yet; awq, gptq and rtn do, by one process")


def kinds(site: Site) -> str:
    return "/".join(name.rpartition(".")[2].removesuffix("_proj") for name in site.linears)


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def assign_float(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    dtype = next(iter(layer.parameters())).dtype
    assign(layer, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def quantize_observed(
    job: Job, layer: Layer, observed: Sequence[SiteStats | None], factors: Sequence[Factor | None]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Quantize a layer from what its sites read in the original, writing nothing.

    It is materialised from the original's tensors first. The statistics may be rescaled in place.

    Returns:
        The layer's tensors as a written shard would stand for them (names local to the layer), and the records.
    """
    layer.load(layer.source)
    result = quantize_layer(job, layer, None, None, observed, factors)
    return as_written(layer.source, result), result.records


def as_written(source: Mapping[str, Tensor], result: LayerResult) -> dict[str, Tensor]:
    """The layer's tensors as a written shard of the result would stand for them, of a layer that was `source`."""
    packed = {f"{name}.weight": quantized for name, quantized in result.quantized.items()}
    rest = {n: to_stored(n, result.changed.get(n, tensor)) for n, tensor in source.items() if n not in packed}
    return rest | {name: dequantize(quantized) for name, quantized in packed.items()}


def folded(source: Mapping[str, Tensor], folds: Sequence[Folded]) -> dict[str, Tensor]:
    """The layer in 16 bit with scales folded into its producers (float32 where they are): it computes the same."""
    tensors = dict(source)
    for used in folds:
        for name in used.fold.readers:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() * used.scale[used.channel]
        for key in ("weight", "bias"):
            if (name := f"{used.fold.producer}.{key}") in tensors:
                tensors[name] = divided(used.fold, key, tensors[name].float(), used.scale)
    return tensors


def _site_input(job: Job, layer: Layer, site: Site, stats: SiteStats | None, channel: Tensor | None) -> SiteInput:
    linears = job.plan.layer(layer.index)
    schemes = {name: linears[name].scheme for name in site.linears}
    present = [scheme for scheme in schemes.values() if scheme is not None]
    return SiteInput(
        weights={name: _weight(layer.module, name) for name in site.linears},
        schemes=schemes,
        stats=stats,
        channel=None if channel is None else channel.to(layer.runtime.device),
        min_zero=max(job.plan.format.min_zero(scheme) for scheme in present),
        ranks=layer.runtime.ranks,
    )


def _last_calibrated(job: Job, sites: Sequence[Site], linears: Mapping[str, LinearPlan]) -> Site | None:
    """The last site whose inputs are summed up."""
    for site in reversed(sites):
        present = [linears[name] for name in site.linears if linears[name].scheme is not None]
        if present and METHODS[job.method_of(present[0])].calibrates:
            return site
    return None


def _collect(site: Site, calibration: Passage, original: Passage | None, *, last: bool) -> SiteStats:
    """Sum up what the site reads, and how far that is from what it reads in the original model."""
    layer, linear = calibration.layer, site.linears[0]
    ranks, device = layer.runtime.ranks, layer.runtime.device
    together = samples_per_sum(calibration.stream.states.shape[1])
    inputs = regrouped(ranks.in_turn(inputs_of(calibration, linear)), together)
    originals = None
    weight = _weight(layer.module, linear)
    few_rows = len(site.linears) == 1 and 2 * weight.shape[0] < weight.shape[1]
    # What the original returns here is made anyway where it goes on to the next layer. Of products in 16 bit the
    # difference would be too rough.
    bias = getattr(layer.module.get_submodule(linear), "bias", None)
    fine = weight.dtype == torch.float32 and not fast_bfloat16()
    multiplied = few_rows and last and bias is None and fine
    if original is not None:
        theirs = inputs_of(original, linear, last=last, returned=multiplied)
        originals = regrouped(ranks.in_turn(theirs), together)
    projection = Projection(weight, applied=multiplied) if few_rows else None
    return shrink_(collect(inputs, weight.shape[1], device, originals, ranks, projection))


def _fold(
    layer: nn.Module,
    used: Folded,
    quantized: Collection[str],
    result: LayerResult,
    settle: Callable[[QuantizedTensor], QuantizedTensor],
) -> None:
    """Divide the producer's outputs by the scale, and multiply the readers that are not among `quantized` by it.

    A producer that is quantized already keeps its codes: its rows' scales are divided. settle: of the format
    """
    producer, scale, channel = used.fold.producer, used.scale, used.channel
    parameters = dict(layer.named_parameters())

    def exact(name: str) -> Tensor:
        return result.changed.get(name, parameters[name].float())

    readers = [f"{name}.weight" for name in used.fold.readers if name not in quantized]
    changed = {name: exact(name) * scale[channel] for name in readers}
    codes = result.quantized.get(producer)
    for key in ("weight", "bias"):
        if (name := f"{producer}.{key}") in parameters and not (codes is not None and key == "weight"):
            changed[name] = divided(used.fold, key, exact(name), scale)
    if codes is not None:
        result.quantized[producer] = settle(divide_rows(codes, scale))
        assign_float(layer, {f"{producer}.weight": dequantize(result.quantized[producer])})
    result.changed |= changed
    assign_float(layer, {name: to_stored(name, tensor) for name, tensor in changed.items()})


def records_of(job: Job, outcome: SiteResult, linears: Mapping[str, LinearPlan]) -> list[dict[str, Any]]:
    """What the journal keeps of linears that were rounded; linears: by the names that the outcome has."""
    return [
        linear.record(_stored_bytes(job, linear), method=job.method_of(linear), **outcome.records[local]).content()
        for local, linear in ((local, linears[local]) for local in outcome.quantized)
    ]


def _stored_bytes(job: Job, linear: LinearPlan) -> int:
    assert linear.scheme is not None
    specs = job.plan.format.specs(linear.scheme, linear.out_features, linear.in_features)
    return sum(spec.nbytes for spec in specs.values())
