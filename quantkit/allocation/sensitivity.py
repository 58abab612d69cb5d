# SPDX-License-Identifier: Apache-2.0
"""What each part of a model loses at each entry of a menu, and what that does to the model's output.

One pass over the model, layer by layer, gives for each part the share of its output that each entry's rounding loses,

    loss(part, entry) = tr((W - Q) H (W - Q)^T) / tr(W H W^T)

and for some swaps (one part at one entry, all else as in the base) the KL divergence of the final logits from the
original model's. A swap in layer l is a stream of a few token windows of its own from layer l on: every layer is
loaded once, and all the streams that are alive run through it. With L layers and every part swapped once that is
about L / 2 x parts per layer forward passes over the windows, and one over the calibration tokens.

The base is the original model, or an allocation: then the calibration tokens run through the quantized layers, and the
swaps say what each part costs where the allocation stands.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.activations import Stream, choose_place
from quantkit.allocation.menu import Entry, Part
from quantkit.calibration import TokenSet
from quantkit.evaluation import (
    Progress,
    advance,
    compare_all,
    embed_tokens,
    embedding_names,
    ending_names,
    loaded,
    observe,
    open_states,
    run_dtype,
)
from quantkit.machine import return_freed_memory
from quantkit.model.families import Site
from quantkit.model.sites import fold_channels, sites_of
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    move_buffers,
    outside_loaded,
    read_layer,
    read_outside,
)
from quantkit.quantize import gptq
from quantkit.quantize.methods import METHODS, Options, SiteInput
from quantkit.scheme import Scheme, dequantize
from quantkit.stats import SiteStats, output_error

Swap = tuple[Part, Entry]


@dataclass(frozen=True)
class Settings:
    """How roundings are made, and where the work runs.

    min_zero: scheme -> the smallest zero point that the format stores safely is the format's; the largest is taken here
    spill: the folder for hidden states that fit in no memory
    """

    method: str
    options: Options
    device: torch.device
    spill: Path
    min_zero: int = 0


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


@torch.no_grad()
def measure(
    model: StreamedModel,
    calibration: TokenSet,
    probe: TokenSet,
    menu: Mapping[Part, Sequence[Entry]],
    base: Mapping[Part, Entry],
    swaps: Sequence[Swap],
    settings: Settings,
    progress: Progress,
    elsewhere: Tensor | None = None,
) -> Measured:
    """Measure in one pass over the model.

    elsewhere: further windows, int64 [n, seqlen of the probe], on which only the base is measured
    menu: the entries to round each part at; base: the parts that are quantized in the base (others are 16 bit);
    swaps: what to measure the KL of; their entries are rounded whether or not the menu has them.
    """
    device = settings.device
    sites = sites_of(model)
    dtype = run_dtype(model, device, f"{model.layer_name(0)}.{sites[0].linears[0]}.weight")
    move_buffers(model.model, device)
    quantized = any(entry is not None for entry in base.values())
    swapped = probe.samples
    if elsewhere is not None and quantized:
        probe = replace(probe, input_ids=torch.cat([probe.input_ids, elsewhere]))
    streams = 2 + quantized + len(swaps)
    room = (streams * probe.input_ids.numel() + calibration.input_ids.numel()) * model.config.hidden_size
    place = choose_place(room * dtype.itemsize, device)

    def opened(tokens: TokenSet, name: str) -> Stream:
        return open_states(model, tokens, dtype, device, settings.spill / f".{name}-states.tmp", place)

    original, calibrated = opened(probe, "original"), opened(calibration, "calibration")
    progress.start(len(model.layers), calibration.input_ids.numel(), {"calibration": place, "probes": place})
    with outside_loaded(model, loaded(read_outside(model, embedding_names(model)), device, dtype)):
        embed_tokens(model, probe, original, device)
        embed_tokens(model, calibration, calibrated, device)
    standing = _copy(original, opened(probe, "base")) if quantized else original
    alive: dict[Swap, Stream] = {}
    losses: dict[Part, dict[Entry, float]] = {}
    for index, layer in enumerate(model.layers):
        progress.layer(index)
        progress.stage("read")
        source = loaded(read_layer(model, index), device, dtype)
        assign(layer, source)
        progress.stage("run the calibration tokens")
        here = {swap: swap[0][1] for swap in swaps if swap[0][0] == index}
        before = standing.states[:swapped].clone() if here else None
        stats = observe(model, index, sites, calibrated, keep=not quantized)
        if quantized:
            advance(model, index, original)
        standing_weights: dict[str, Tensor] = {}
        tried: dict[Swap, dict[str, Tensor]] = {}
        for number, site in enumerate(sites):
            part = (index, number)
            wanted = [*menu.get(part, ()), base.get(part), *(entry for (at, entry) in here if at == part)]
            progress.stage(f"round {'/'.join(name.rpartition('.')[2] for name in site.linears)}")
            losses[part] = {None: 0.0}
            for entry, weights, loss in _rounded(model, index, site, stats[number], wanted, settings):
                losses[part][entry] = loss
                if base.get(part) == entry:
                    standing_weights |= weights
                if (part, entry) in here:
                    tried[part, entry] = weights
        del stats
        progress.stage("run the swaps")
        if before is not None:
            for swap, number in here.items():
                stream = opened(replace(probe, input_ids=probe.input_ids[:swapped]), "swap")
                stream.states.copy_(before)
                weights = tried.get(
                    swap, {f"{name}.weight": source[f"{name}.weight"] for name in sites[number].linears}
                )
                assign(layer, source | standing_weights | weights)
                advance(model, index, stream)
                alive[swap] = stream
        assign(layer, source | standing_weights)
        for swap, stream in alive.items():
            if swap not in here:
                advance(model, index, stream)
        advance(model, index, standing)
        if quantized:
            advance(model, index, calibrated)
        drop(layer)
        return_freed_memory()
        worst = max((loss for part in losses if part[0] == index for loss in losses[part].values()), default=0.0)
        progress.finished(index, worst, False)
    progress.ending("compare the logits")
    outside = loaded(read_outside(model, ending_names(model)), device, dtype)

    def divergences(windows: slice, streams: Sequence[Stream]) -> list[dict[str, Any]]:
        tokens = replace(probe, input_ids=probe.input_ids[windows])
        reference, *others = (replace(s, states=s.states[windows]) for s in (original, *streams))
        return compare_all(model, tokens, reference, others, outside, outside.items(), device)

    based, *others = divergences(slice(0, swapped), [standing, *alive.values()])
    kls = [float(figure["kl_divergence"]) for figure in others]
    further = divergences(slice(swapped, None), [standing])[0] if probe.samples > swapped else None
    return Measured(
        losses,
        float(based["kl_divergence"]),
        dict(zip(alive, kls, strict=True)),
        based["tokens"],
        None if further is None else float(further["kl_divergence"]),
    )


def _copy(source: Stream, target: Stream) -> Stream:
    target.states.copy_(source.states)
    return target


def _rounded(
    model: StreamedModel, index: int, site: Site, stats: SiteStats, entries: Sequence[Entry], settings: Settings
) -> Iterator[tuple[Scheme, dict[str, Tensor], float]]:
    """(entry, the weights as they compute, the share of the output that is lost), one entry after the other.

    A scale that an earlier op would absorb is divided out again: alone in its layer, the part computes the same.
    """
    layer = model.layers[index]
    weights: dict[str, Tensor] = {}
    for name in site.linears:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weights[name] = weight
    energy = sum(float(output_error(weight, stats.gram).sum()) for weight in weights.values())
    schemes = [entry for entry in dict.fromkeys(entries) if entry is not None]
    options = settings.options
    factor = None
    if schemes and settings.method == "gptq":
        factor = gptq.factorize(stats.gram, damp=options.damp, act_order=options.act_order)
    channel = fold_channels(model, index, site) if settings.method == "awq" else None
    channel = None if channel is None else channel.to(settings.device)
    for scheme in schemes:
        # Scaling rescales the Gram matrix in place: each entry needs its own.
        own = stats if channel is None else replace(stats, gram=stats.gram.clone())
        outcome = METHODS[settings.method](
            SiteInput(weights, dict.fromkeys(weights, scheme), own, channel, settings.min_zero, factor), options
        )
        found, error = {}, 0.0
        for name, quantized in outcome.quantized.items():
            computed = dequantize(quantized)
            if outcome.scale is not None and channel is not None:
                computed /= outcome.scale[channel]
            error += float(output_error(computed - weights[name].float(), stats.gram).sum())
            found[f"{name}.weight"] = computed.to(weights[name].dtype)
        yield scheme, found, error / energy if energy > 0 else 0.0
