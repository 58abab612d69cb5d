# SPDX-License-Identifier: Apache-2.0
"""The sites of a model: the row of its family, or what watching one forward pass shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import ModelError
from quantkit.model.families import FAMILIES, Site, producer_channels
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embed,
    embedding_names,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
)


def sites_of(model: StreamedModel) -> tuple[Site, ...]:
    """The family's row, or what watching layer 0 shows.

    Raises:
        ModelError: a layer whose linears are not those of the sites.
    """
    kind = model.config.model_type
    sites = FAMILIES.get(kind) or discover_sites(model)
    known = {name for site in sites for name in site.linears}
    for index, layer in enumerate(model.layers):
        found = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        if found != known:
            odd = ", ".join(sorted(found ^ known))
            raise ModelError(f"{model.layer_name(index)}: linears {odd} do not fit the sites of {kind}")
    return sites


def discover_sites(model: StreamedModel) -> tuple[Site, ...]:
    """Find the linears of a layer that read the very same tensor, and the earlier ops that can absorb a scale.

    A fold is believed only when it was tried: with the outputs of the op divided and the linears multiplied by random
    scales, the layer must compute the same function.
    """
    generator = torch.Generator().manual_seed(0)
    outside = {name: tensor.float() for name, tensor in read_outside(model, embedding_names(model)).items()}
    with torch.no_grad(), outside_loaded(model, outside):
        ids = torch.randint(model.config.vocab_size, (1, 16), generator=generator)
        hidden = embed(model, ids)
        layer = model.layers[0]
        assign(layer, {n: t.float() if t.is_floating_point() else t for n, t in read_layer(model, 0).items()})
        try:
            groups, norms = _watch(model, hidden)
            expected = run_layer(model, 0, hidden)
            sites: list[Site] = []
            for key, names in groups.items():
                earlier = [name for site in reversed(sites) for name in site.linears]
                candidates = [Site(tuple(names), producer) for producer in (*norms.get(key, ()), *earlier)]
                good = (site for site in candidates if _preserves(model, site, hidden, expected, generator))
                sites.append(next(good, Site(tuple(names))))
            return tuple(sites)
        finally:
            drop(layer)


Key = tuple[int, int, int, int]


def _key(tensor: Tensor) -> Key:
    """What makes two linears' inputs the very same tensor, whatever view of it they take."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor._version


def _watch(model: StreamedModel, hidden: Tensor) -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
    """Run layer 0: the linears by what they read, in execution order, and the norms by what they return."""
    groups: dict[Key, list[str]] = {}
    norms: dict[Key, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            groups.setdefault(_key(args[0]), []).append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                norms.setdefault(_key(output), []).append(name)

        return hook

    handles = []
    for name, module in model.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(before(name)))
        elif name and "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(after(name)))
    try:
        run_layer(model, 0, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return groups, norms


def _preserves(model: StreamedModel, site: Site, hidden: Tensor, expected: Tensor, generator: torch.Generator) -> bool:
    """Whether folding random scales into the site's producer leaves layer 0 the same function.

    Powers of two make a true fold exact, and what the scales do to the layer without the fold is the measure.
    """
    layer = model.layers[0]
    assert site.producer is not None
    producer = layer.get_submodule(site.producer)
    channel = fold_channels(model, 0, site)
    if channel is None:
        return False
    touched = {site.producer, *site.linears}
    saved = {n: p.clone() for n, p in layer.named_parameters() if n.rpartition(".")[0] in touched}
    scale = torch.exp2(torch.randint(-2, 3, (int(channel.max()) + 1,), generator=generator).float())
    for name in site.linears:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.mul_(scale[channel])
    unfolded = _distance(run_layer(model, 0, hidden), expected)
    divide_producer(producer, scale)
    folded = _distance(run_layer(model, 0, hidden), expected)
    assign(layer, saved)
    return folded < 1e-4 * unfolded


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def divide_producer(producer: nn.Module, scale: Tensor) -> None:
    """Divide the outputs of a norm or linear by scale [channels], in place: its weight's rows, and its bias."""
    weight = producer.weight
    assert isinstance(weight, Tensor)
    weight.div_(scale if weight.dim() == 1 else scale.unsqueeze(1))
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(scale)


def fold_channels(model: StreamedModel, index: int, site: Site) -> Tensor | None:
    """For each input column of the site, the producer's channel that feeds it; None when nothing can absorb a scale."""
    if site.producer is None:
        return None
    layer, config = model.layers[index], model.config
    linear, producer = layer.get_submodule(site.linears[0]), layer.get_submodule(site.producer)
    if not isinstance(getattr(producer, "weight", None), Tensor):
        return None
    assert isinstance(linear, nn.Linear)
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return producer_channels(linear.in_features, producer, head_dim)
