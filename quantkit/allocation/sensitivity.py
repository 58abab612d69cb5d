# SPDX-License-Identifier: Apache-2.0
"""What each part of a model loses at each entry of a menu, and what that does to the model's output.

One pass over the model, layer by layer, gives for each part the share of its output that each entry's rounding loses,

    loss(part, entry) = tr((W - Q) H (W - Q)^T) / tr(W H W^T)

and for some swaps (one part at one entry, all else as in the base) the KL divergence of the final logits from the
original model's. A swap in layer l is a stream of a few token windows of its own from layer l on: every layer is
loaded once, and all the streams that have begun run through it. With L layers and every part swapped once that is
about L / 2 x parts per layer forward passes over the windows, and one over the calibration tokens.

The base is the original model (`measure_menu`), or an allocation (`measure_choice`): then every layer is quantized by
the very function of a run, later layers are calibrated on what it leaves, and the swaps, each of one part back to 16
bit, say what the part costs where the allocation stands.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.allocation.menu import HEAD, Entry, Part
from quantkit.calibration.tokens import TokenSet
from quantkit.grids.registry import dequantize
from quantkit.methods import gptq
from quantkit.methods.site import QUANTIZE, SiteInput
from quantkit.methods.table import METHODS
from quantkit.model.family import Site
from quantkit.model.sites import fold_channels, sites_of
from quantkit.model.streaming import embed, embedding_names, move_buffers, outside_loaded, read_outside
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.compare import compare_logits
from quantkit.pipeline.forward import Layer, embed_original, ending_names, open_states
from quantkit.pipeline.head import head_stats, quantize_head
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import as_written, folded, quantize_layer
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.site_inputs import Passage, observe
from quantkit.pipeline.walk import walk
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

    base: Tensors
    swapped_weights: Mapping[Swap, Tensors]
    worst: float


@dataclass(frozen=True)
class Probe:
    """The windows that measure, and what runs on them.

    swaps: each has a stream of its own from its layer on; windows: how many of the tokens' windows they see
    quantized: whether the base is another model than the original
    """

    tokens: TokenSet
    swaps: Sequence[Swap]
    windows: int
    quantized: bool


@torch.no_grad()
def measure_menu(
    job: Job, probe: TokenSet, menu: Mapping[Part, Sequence[Entry]], swaps: Sequence[Swap], progress: Progress
) -> Measured:
    """The losses of every part at its entries, and the KL of each swap in the original model.

    job: how roundings are made, and what calibrates them; menu: the entries to round each part at; swaps: what to
    measure the KL of, entries of the menu
    """
    runtime = job.runtime
    model = runtime.model
    move_buffers(model.model, runtime.device)
    assert job.calibration is not None
    calibration = _embedded(runtime, job.calibration, "calibration")
    losses: dict[Part, dict[Entry, float]] = {}

    def step(layer: Layer) -> Step:
        progress.stage("run the calibration tokens")
        observed = observe(layer, calibration)
        swapped_weights: dict[Swap, Tensors] = {}
        for number, site in enumerate(layer.sites):
            part = (layer.index, number)
            if part not in menu:  # all of it stays in 16 bit
                continue
            progress.stage(f"round {'/'.join(name.rpartition('.')[2] for name in site.linears)}")
            losses[part] = {None: 0.0}
            for entry, weights, loss in _rounded(job, layer, site, observed[number], menu[part]):
                losses[part][entry] = loss
                if (part, entry) in swaps:
                    swapped_weights[part, entry] = weights
        worst = max((max(losses[part].values()) for part in losses if part[0] == layer.index), default=0.0)
        return Step(layer.weights, swapped_weights, worst)

    original, _, streams = _follow(runtime, Probe(probe, swaps, probe.samples, quantized=False), step, progress)
    outside = runtime.loaded(read_outside(model, ending_names(model)))
    figures = compare_logits(runtime, probe, original, list(streams.values()), outside, outside.items())
    swapped = dict(zip(streams, (figure["kl_divergence"] for figure in figures), strict=True))
    if HEAD in menu:
        progress.stage("round lm_head")
        losses[HEAD] = {None: 0.0}
        name = f"{model.head_name}.weight"
        stats = head_stats(runtime, calibration)
        for entry in menu[HEAD]:
            if entry is not None:
                rounded, record = quantize_head(outside[name], entry, job.options, stats, job.plan.format)
                losses[HEAD][entry] = record["loss"]
                if (HEAD, entry) in swaps:
                    instead = outside | {name: dequantize(rounded, runtime.dtype)}
                    (figure,) = compare_logits(runtime, probe, original, [original], outside, instead.items())
                    swapped[HEAD, entry] = figure["kl_divergence"]
    return Measured(losses, 0.0, swapped, probe.samples * (probe.seqlen - 1))


@torch.no_grad()
def measure_choice(
    job: Job, probe: TokenSet, elsewhere: Tensor | None, parts: Sequence[Part], progress: Progress
) -> Measured:
    """The KL of what a run of the job would leave, and of the same with each of some parts back in 16 bit.

    elsewhere: further windows, int64 [n, seqlen of the probe], on which only the whole is measured
    """
    runtime = job.runtime
    model = runtime.model
    move_buffers(model.model, runtime.device)
    swaps: list[Swap] = [(part, None) for part in parts]
    assert job.calibration is not None
    calibration = replace(_embedded(runtime, job.calibration, "calibration"), exact=False)
    reference = None
    if job.reference is not None:
        reference = replace(_embedded(runtime, job.reference, "reference"), exact=False)

    def step(layer: Layer) -> Step:
        passage, followed = Passage(layer, calibration, len(calibration.states)), None
        if reference is not None:
            followed = Passage(layer, reference, len(reference.states), weights=layer.weights, run_to_end=True)
        result = quantize_layer(job, layer, passage, followed)
        base = runtime.loaded(as_written(layer.weights, result))
        restored = runtime.loaded(folded(layer.weights, result.folds))
        if reference is not None:
            layer.load(layer.weights)
            layer.advance(reference, first=followed.finished if followed else 0)
        layer.load(base)
        layer.advance(calibration)
        swapped_weights = {
            swap: {f"{name}.weight": restored[f"{name}.weight"] for name in layer.sites[swap[0][1]].linears}
            for swap in swaps
            if swap[0][0] == layer.index
        }
        return Step(base, swapped_weights, max((record["loss"] for record in result.records), default=0.0))

    both = probe if elsewhere is None else replace(probe, input_ids=torch.cat([probe.input_ids, elsewhere]))
    original, base, streams = _follow(runtime, Probe(both, swaps, probe.samples, quantized=True), step, progress)
    outside = runtime.loaded(read_outside(model, ending_names(model)))
    whole = outside
    head = job.plan.head
    if head is not None and head.scheme is not None:
        progress.stage("round lm_head")
        name = f"{head.name}.weight"
        stats = head_stats(runtime, calibration, reference)
        rounded, _ = quantize_head(outside[name], head.scheme, job.options, stats, job.plan.format)
        whole = outside | {name: dequantize(rounded, runtime.dtype)}
    first, rest = slice(0, probe.samples), slice(probe.samples, both.samples)
    theirs, ours = _cut(original, first), _cut(base, first)
    whole_figures, *others = compare_logits(runtime, probe, theirs, [ours, *streams.values()], outside, whole.items())
    swapped = dict(zip(streams, (figure["kl_divergence"] for figure in others), strict=True))
    if HEAD in parts:
        (figure,) = compare_logits(runtime, probe, theirs, [ours], outside, outside.items())
        swapped[HEAD, None] = figure["kl_divergence"]
    kl_elsewhere = None
    if both.samples > probe.samples:
        tokens = replace(probe, input_ids=both.input_ids[rest])
        theirs, ours = _cut(original, rest), _cut(base, rest)
        (figure,) = compare_logits(runtime, tokens, theirs, [ours], outside, whole.items())
        kl_elsewhere = figure["kl_divergence"]
    return Measured({}, whole_figures["kl_divergence"], swapped, whole_figures["tokens"], kl_elsewhere)


# ---------------------------------------------------------------- streams


def _embedded(runtime: Runtime, tokens: TokenSet, name: str) -> Stream:
    stream = open_states(runtime, tokens, name)
    embed_original(runtime, tokens, stream)
    return stream


def _learn_sizes(runtime: Runtime, tokens: TokenSet, batch: int) -> None:
    """Let the model show what its layers are called with in the last micro-batch of a stream, if that is smaller."""
    model = runtime.model
    if rest := tokens.samples % batch:
        with outside_loaded(model, runtime.loaded(read_outside(model, embedding_names(model)))):
            embed(model, tokens.input_ids[:rest].to(runtime.device))


def _follow(
    runtime: Runtime, probe: Probe, step: Callable[[Layer], Step], progress: Progress
) -> tuple[Stream, Stream, dict[Swap, Stream]]:
    """(the original's hidden states behind the last layer, the base's, each swap's) for the windows of a probe.

    step: called with each layer as it is in the original, materialised
    """
    model = runtime.model
    original = _embedded(runtime, probe.tokens, "original")
    base = original
    if probe.quantized:
        base = open_states(runtime, probe.tokens, "base")
        base.states.copy_(original.states)
    windows = replace(probe.tokens, input_ids=probe.tokens.input_ids[: probe.windows])
    _learn_sizes(runtime, windows, original.batch)
    progress.start(len(model.layers), probe.tokens.input_ids.numel(), {"probes": original.place})
    streams: dict[Swap, Stream] = {}
    with walk(runtime, progress, sites=sites_of(model)) as layers:
        for layer in layers:
            if probe.quantized:
                progress.stage("run the original")
                layer.advance(original)
            measured = step(layer)
            progress.stage("run the swaps")
            for swap in [swap for swap in probe.swaps if swap[0][0] == layer.index]:
                streams[swap] = open_states(runtime, windows, "swap")
                streams[swap].states.copy_(base.states[: probe.windows])
            for swap, stream in streams.items():
                layer.load({**measured.base, **measured.swapped_weights.get(swap, {})})
                layer.advance(stream)
            layer.load(measured.base)
            layer.advance(base)
            progress.finished(layer.index, measured.worst, False)
            del measured
    progress.ending("compare the logits")
    return original, base, streams


def _cut(stream: Stream, windows: slice) -> Stream:
    return replace(stream, states=stream.states[windows])


# ---------------------------------------------------------------- rounding at every entry


def _rounded(
    job: Job, layer: Layer, site: Site, stats: SiteStats, entries: Sequence[Entry]
) -> Iterator[tuple[Scheme, dict[str, Tensor], float]]:
    """(entry, the weights as they compute, the share of the output that is lost), one entry after the other.

    A scale that an earlier op would absorb is divided out again: alone in its layer, the part computes the same.
    """
    linears = job.plan.layer(layer.index)
    weights = {name: layer.module.get_parameter(f"{name}.weight") for name in site.linears}
    rounded = [name for name in site.linears if not linears[name].role.sixteen_bit]
    energy = sum(float(output_error(weights[name], stats.gram).sum()) for name in rounded)
    schemes = [entry for entry in dict.fromkeys(entries) if entry is not None]
    options = job.options
    factor = None
    if schemes and METHODS[job.method].shares_factor:
        factor = gptq.factorize(stats.gram, damp=options.damp, act_order=options.act_order)
    channel = fold_channels(layer.runtime.model, layer.index, site.fold) if METHODS[job.method].folds else None
    channel = None if channel is None else channel.to(layer.runtime.device)
    for scheme in schemes:
        # Scaling rescales the Gram matrix in place: each entry needs its own.
        own = stats if channel is None else replace(stats, gram=stats.gram.clone())
        schemes_of = dict.fromkeys(weights) | dict.fromkeys(rounded, scheme)
        site_input = SiteInput(weights, schemes_of, own, channel, job.plan.format.min_zero(scheme), factor)
        outcome = QUANTIZE[job.method](site_input, options)
        computed_weights, error = {}, 0.0
        for name, quantized in outcome.quantized.items():
            computed = dequantize(job.plan.format.settle(quantized))
            if outcome.scale is not None and channel is not None:
                computed /= outcome.scale[channel]
            error += float(output_error(computed - weights[name].float(), stats.gram).sum())
            computed_weights[f"{name}.weight"] = computed.to(weights[name].dtype)
        yield scheme, computed_weights, error / energy if energy > 0 else 0.0
