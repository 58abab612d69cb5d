# SPDX-License-Identifier: Apache-2.0
"""What each part of a model loses at each entry of a menu, and what that does to the model's output.

One pass over the model, layer by layer, gives for each part the share of its output that each entry's rounding loses,

    loss(part, entry) = tr((W - Q) H (W - Q)^T) / tr(W H W^T)

and for some swaps (one part at one entry, all else as in the base) the KL divergence of the final logits from the
original model's. A swap in layer l is a stream of a few token windows of its own from layer l on: every layer is
loaded once, and all the streams that are alive run through it. With L layers and every part swapped once that is
about L / 2 x parts per layer forward passes over the windows, and one over the calibration tokens.

The base is the original model (`measure_menu`), or an allocation (`measure_choice`): then every layer is quantized by
the very function of a run, later layers are calibrated on what it leaves, and the swaps, each of one part back to 16
bit, say what the part costs where the allocation stands.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.allocation.menu import HEAD, Entry, Part
from quantkit.calibration.tokens import TokenSet
from quantkit.grids.registry import dequantize
from quantkit.hardware.machine import return_freed_memory
from quantkit.methods import gptq
from quantkit.methods.site import QUANTIZE, SiteInput
from quantkit.methods.table import METHODS
from quantkit.model.families import Site
from quantkit.model.sites import fold_channels, sites_of
from quantkit.model.streaming import (
    assign,
    drop,
    embed,
    embedding_names,
    move_buffers,
    outside_loaded,
    read_layer,
    read_outside,
)
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import (
    Progress,
    advance,
    compare_all,
    embed_original,
    ending_names,
    loaded,
    observe,
    open_states,
)
from quantkit.pipeline.head import head_stats, quantize_head
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import as_written, folded, quantize_layer
from quantkit.pipeline.site_inputs import Passage
from quantkit.scheme import Scheme
from quantkit.stats import SiteStats, output_error

Swap = tuple[Part, Entry]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """losses: part -> entry -> share of its output; kl: of the base on the probe; swapped: swap -> KL there;

    tokens: that were predicted there; kl_elsewhere: of the base on other windows, None where there were none
    """

    losses: dict[Part, dict[Entry, float]]
    kl: float
    swapped: dict[Swap, float]
    tokens: int = 0
    kl_elsewhere: float | None = None


@dataclass(frozen=True)
class Step:
    """A layer of the base as it runs, and what each swap that begins in it has in place of some of its weights."""

    standing: Tensors
    tried: Mapping[Swap, Tensors]
    worst: float


@torch.no_grad()
def measure_menu(
    job: Job, probe: TokenSet, menu: Mapping[Part, Sequence[Entry]], swaps: Sequence[Swap], progress: Progress
) -> Measured:
    """The losses of every part at its entries, and the KL of each swap in the original model.

    job: how roundings are made, and what calibrates them; menu: the entries to round each part at; swaps: what to
    measure the KL of, entries of the menu
    """
    model, sites = job.model, sites_of(job.model)
    move_buffers(model.model, job.device)
    assert job.calibration is not None
    calibration = _embedded(job, job.calibration, "calibration")
    losses: dict[Part, dict[Entry, float]] = {}

    def step(index: int, source: Tensors) -> Step:
        progress.stage("run the calibration tokens")
        observed = observe(model, index, sites, calibration)
        tried: dict[Swap, Tensors] = {}
        for number, site in enumerate(sites):
            part = (index, number)
            progress.stage(f"round {'/'.join(name.rpartition('.')[2] for name in site.linears)}")
            losses[part] = {None: 0.0}
            for entry, weights, loss in _rounded(job, index, site, observed[number], menu[part]):
                losses[part][entry] = loss
                if (part, entry) in swaps:
                    tried[part, entry] = weights
        return Step(source, tried, max(max(losses[index, number].values()) for number in range(len(sites))))

    original, _, alive = _follow(job, probe, swaps, step, progress, quantized=False)
    outside = loaded(read_outside(model, ending_names(model)), job.device, job.dtype)
    figures = _divergences(job, probe, original, list(alive.values()), outside, outside)
    swapped = dict(zip(alive, (figure["kl_divergence"] for figure in figures), strict=True))
    if HEAD in menu:
        progress.stage("round lm_head")
        losses[HEAD] = {None: 0.0}
        name = f"{model.head_name}.weight"
        stats = head_stats(model, calibration, None, job.device, job.dtype)
        for entry in menu[HEAD]:
            if entry is not None:
                rounded, record = quantize_head(outside[name], entry, job.options, stats, job.plan.format)
                losses[HEAD][entry] = record["loss"]
                if (HEAD, entry) in swaps:
                    instead = outside | {name: dequantize(rounded, job.dtype)}
                    (figure,) = _divergences(job, probe, original, [original], outside, instead)
                    swapped[HEAD, entry] = figure["kl_divergence"]
    return Measured(losses, 0.0, swapped, probe.samples * (probe.seqlen - 1))


@torch.no_grad()
def measure_choice(
    job: Job, probe: TokenSet, elsewhere: Tensor | None, parts: Sequence[Part], progress: Progress
) -> Measured:
    """The KL of what a run of the job would leave, and of the same with each of some parts back in 16 bit.

    elsewhere: further windows, int64 [n, seqlen of the probe], on which only the whole is measured
    """
    model, sites = job.model, sites_of(job.model)
    move_buffers(model.model, job.device)
    swaps: list[Swap] = [(part, None) for part in parts]
    assert job.calibration is not None
    calibration = _embedded(job, job.calibration, "calibration")
    beside = None if job.beside is None else _embedded(job, job.beside, "beside")

    def step(index: int, source: Tensors) -> Step:
        layer = model.layers[index]
        seen, followed = Passage(model, index, calibration, len(calibration.states)), None
        if beside is not None:
            followed = Passage(model, index, beside, len(beside.states), weights=source, leaves=True)
        result = quantize_layer(job, index, sites, source, seen, followed, None, progress)
        standing = loaded(as_written(source, result), job.device, job.dtype)
        back = loaded(folded(source, result.folds), job.device, job.dtype)
        if beside is not None:
            assign(layer, source)
            advance(model, index, beside, first=followed.left if followed else 0, exact=False)
        assign(layer, standing)
        advance(model, index, calibration, exact=False)
        tried = {
            swap: {f"{name}.weight": back[f"{name}.weight"] for name in sites[swap[0][1]].linears}
            for swap in swaps
            if swap[0][0] == index
        }
        return Step(standing, tried, max((record["loss"] for record in result.records), default=0.0))

    both = probe if elsewhere is None else replace(probe, input_ids=torch.cat([probe.input_ids, elsewhere]))
    original, standing, alive = _follow(job, both, swaps, step, progress, quantized=True, swapped=probe.samples)
    outside = loaded(read_outside(model, ending_names(model)), job.device, job.dtype)
    whole = outside
    head = job.plan.head
    if head is not None and head.scheme is not None:
        progress.stage("round lm_head")
        name = f"{head.name}.weight"
        stats = head_stats(model, calibration, beside, job.device, job.dtype)
        rounded, _ = quantize_head(outside[name], head.scheme, job.options, stats, job.plan.format)
        whole = outside | {name: dequantize(rounded, job.dtype)}
    first, rest = slice(0, probe.samples), slice(probe.samples, both.samples)
    reference, base = _cut(original, first), _cut(standing, first)
    based, *others = _divergences(job, probe, reference, [base, *alive.values()], outside, whole)
    swapped = dict(zip(alive, (figure["kl_divergence"] for figure in others), strict=True))
    if HEAD in parts:
        (figure,) = _divergences(job, probe, reference, [base], outside, outside)
        swapped[HEAD, None] = figure["kl_divergence"]
    kl_elsewhere = None
    if both.samples > probe.samples:
        tokens = replace(probe, input_ids=both.input_ids[rest])
        (figure,) = _divergences(job, tokens, _cut(original, rest), [_cut(standing, rest)], outside, whole)
        kl_elsewhere = figure["kl_divergence"]
    return Measured({}, based["kl_divergence"], swapped, based["tokens"], kl_elsewhere)


# ---------------------------------------------------------------- streams


def _opened(job: Job, tokens: TokenSet, name: str) -> Stream:
    return open_states(job.model, tokens, job.dtype, job.device, job.out / f".{name}-states.tmp", job.place, job.batch)


def _embedded(job: Job, tokens: TokenSet, name: str) -> Stream:
    stream = _opened(job, tokens, name)
    embed_original(job.model, tokens, stream, job.device)
    return stream


def _learn_sizes(job: Job, tokens: TokenSet, batch: int) -> None:
    """Let the model show what its layers are called with in the last micro-batch of a stream, if that is smaller."""
    if rest := tokens.samples % batch:
        names = embedding_names(job.model)
        with outside_loaded(job.model, loaded(read_outside(job.model, names), job.device, job.dtype)):
            embed(job.model, tokens.input_ids[:rest].to(job.device))


def _follow(
    job: Job,
    tokens: TokenSet,
    swaps: Sequence[Swap],
    step: Callable[[int, Tensors], Step],
    progress: Progress,
    *,
    quantized: bool,
    swapped: int | None = None,
) -> tuple[Stream, Stream, dict[Swap, Stream]]:
    """(the original's hidden states behind the last layer, the base's, each swap's) for some windows of tokens.

    step: called with each layer as it is in the original, materialised; quantized: whether the base is another model;
    swapped: how many of the windows the swaps see (None: all)
    """
    model = job.model
    original = _embedded(job, tokens, "original")
    standing = original
    if quantized:
        standing = _opened(job, tokens, "base")
        standing.states.copy_(original.states)
    seen = replace(tokens, input_ids=tokens.input_ids[:swapped])
    _learn_sizes(job, seen, original.batch)
    progress.start(len(model.layers), tokens.input_ids.numel(), {"probes": original.place})
    alive: dict[Swap, Stream] = {}
    for index, layer in enumerate(model.layers):
        progress.layer(index)
        progress.stage("read")
        source = loaded(read_layer(model, index), job.device, job.dtype)
        assign(layer, source)
        if quantized:
            progress.stage("run the original")
            advance(model, index, original)
        found = step(index, source)
        progress.stage("run the swaps")
        for swap in [swap for swap in swaps if swap[0][0] == index]:
            alive[swap] = _opened(job, seen, "swap")
            alive[swap].states.copy_(standing.states[:swapped])
        for swap, stream in alive.items():
            assign(layer, {**found.standing, **found.tried.get(swap, {})})
            advance(model, index, stream)
        assign(layer, found.standing)
        advance(model, index, standing)
        drop(layer)
        return_freed_memory()
        progress.finished(index, found.worst, False)
    progress.ending("compare the logits")
    return original, standing, alive


def _cut(stream: Stream, windows: slice) -> Stream:
    return replace(stream, states=stream.states[windows])


def _divergences(
    job: Job, tokens: TokenSet, original: Stream, streams: Sequence[Stream], outside: Tensors, theirs: Tensors
) -> list[dict[str, Any]]:
    """The figures of each stream; outside: the tensors outside the layers of the original; theirs: of the streams."""
    return compare_all(job.model, tokens, original, streams, outside, theirs.items(), job.device)


# ---------------------------------------------------------------- rounding at every entry


def _rounded(
    job: Job, index: int, site: Site, stats: SiteStats, entries: Sequence[Entry]
) -> Iterator[tuple[Scheme, dict[str, Tensor], float]]:
    """(entry, the weights as they compute, the share of the output that is lost), one entry after the other.

    A scale that an earlier op would absorb is divided out again: alone in its layer, the part computes the same.
    """
    layer = job.model.layers[index]
    weights: dict[str, Tensor] = {}
    for name in site.linears:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weights[name] = weight
    energy = sum(float(output_error(weight, stats.gram).sum()) for weight in weights.values())
    schemes = [entry for entry in dict.fromkeys(entries) if entry is not None]
    options = job.options
    factor = None
    if schemes and METHODS[job.method].shares_factor:
        factor = gptq.factorize(stats.gram, damp=options.damp, act_order=options.act_order)
    channel = fold_channels(job.model, index, site) if METHODS[job.method].folds else None
    channel = None if channel is None else channel.to(job.device)
    for scheme in schemes:
        # Scaling rescales the Gram matrix in place: each entry needs its own.
        own = stats if channel is None else replace(stats, gram=stats.gram.clone())
        site_input = SiteInput(
            weights, dict.fromkeys(weights, scheme), own, channel, job.plan.format.min_zero(scheme), factor
        )
        outcome = QUANTIZE[job.method](site_input, options)
        found, error = {}, 0.0
        for name, quantized in outcome.quantized.items():
            computed = dequantize(job.plan.format.settle(quantized))
            if outcome.scale is not None and channel is not None:
                computed /= outcome.scale[channel]
            error += float(output_error(computed - weights[name].float(), stats.gram).sum())
            found[f"{name}.weight"] = computed.to(weights[name].dtype)
        yield scheme, found, error / energy if energy > 0 else 0.0
