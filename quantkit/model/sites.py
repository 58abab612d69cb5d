# SPDX-License-Identifier: Apache-2.0
"""The sites of a model: the row of its family, or what watching one forward pass shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import ModelError
from quantkit.formats.names import expert_of
from quantkit.model.experts import Experts, experts_of
from quantkit.model.family import Fold, Site
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


def sites_of(model: StreamedModel) -> tuple[tuple[Site, ...], ...]:
    """The sites of each layer: by the family's row, or as watching one layer of each kind shows.

    Layers with experts are watched: a row says nothing of these.

    Raises:
        ModelError: a layer whose linears are not those of the family's row.
    """
    found = model.known_sites()
    if not found or any(map(experts_of, model.layers)):
        return discover_sites(model)
    for index, (sites, linears) in enumerate(zip(found, model.layer_linears, strict=True)):
        known = {name for site in sites for name in site.linears}
        kept = {name for name in linears if model.family.role(name).sixteen_bit}
        if linears.keys() - kept != known - kept:
            odd = ", ".join(sorted((linears.keys() ^ known) - kept))
            kind = model.config.model_type
            raise ModelError(f"{model.layer_name(index)}: linears {odd} do not fit the sites of {kind}")
    return tuple(found)


def discover_sites(model: StreamedModel) -> tuple[tuple[Site, ...], ...]:
    """Find the linears of each layer that read the very same tensor, and the earlier ops that can absorb a scale.

    Layers with the same tensors are alike: the first of each kind is watched.
    """
    generator = torch.Generator().manual_seed(0)
    outside = {name: tensor.float() for name, tensor in read_outside(model, embedding_names(model)).items()}
    found: dict[object, tuple[Site, ...]] = {}
    kinds = [tuple(tensors.items()) for tensors in model.layer_tensors]
    with torch.no_grad(), outside_loaded(model, outside):
        hidden = embed(model, torch.randint(model.config.vocab_size, (1, 16), generator=generator))
        for index, kind in enumerate(kinds):
            if kind not in found:
                found[kind] = _discover(model, index, hidden, generator)
    return tuple(found[kind] for kind in kinds)


def _discover(model: StreamedModel, index: int, hidden: Tensor, generator: torch.Generator) -> tuple[Site, ...]:
    """The sites of one layer, which is run on these hidden states.

    A fold is believed only when it was tried: with the outputs of the op divided and the linears multiplied by random
    scales, the layer must compute the same function.
    """
    layer = model.layers[index]
    assign(layer, {n: t.float() if t.is_floating_point() else t for n, t in read_layer(model, index).items()})
    try:
        mixtures = experts_of(layer)
        groups, norms = _watch(model, index, hidden)
        expected = run_layer(model, index, hidden)
        sites: list[Site] = []
        for key, names in groups.items():
            earlier = [name for site in reversed(sites) for name in site.linears if not expert_of(name)]
            if linears := tuple(name for name in names if name not in mixtures):
                behind = [Fold(norm, linears, plus) for norm in norms.get(_memory(key), ()) for plus in (0, 1)]
                folds = [*behind, *(Fold(name, linears) for name in earlier)]
                good = (fold for fold in folds if _preserves(model, index, fold, hidden, expected, generator))
                sites.append(Site(linears, next(good, None)))
            sites += [site for name in names if name in mixtures for site in expert_sites(name, mixtures[name])]
        return tuple(sites)
    finally:
        drop(layer)


def expert_sites(block: str, experts: Experts) -> list[Site]:
    """The sites of a mixture: of each expert gate and up, then down, a scale of whose inputs up can mostly absorb."""
    found = []
    for number in range(len(experts)):
        gate, up, down = (f"{block}.{number}.{name}" for name in experts.names)
        found += [Site((gate, up)), Site((down,), Fold(up, (down,)) if experts.scales_through else None)]
    return found


Key = tuple[int, int, int, int]


def _key(tensor: Tensor) -> Key:
    """What makes two linears' inputs the very same tensor, whatever view of it they take."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor._version


def _memory(key: Key) -> Key:
    """The same for tensors that may be seen in another shape, as by the heads of a norm within attention."""
    return (*key[:2], 0, key[3])


def _watch(model: StreamedModel, index: int, hidden: Tensor) -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
    """Run a layer: the linears and mixtures by what they read, in execution order, the norms by what they return."""
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
                norms.setdefault(_memory(_key(output)), []).append(name)

        return hook

    handles = []
    for name, module in model.layers[index].named_modules():
        if isinstance(module, nn.Linear | Experts) and not expert_of(name):
            handles.append(module.register_forward_pre_hook(before(name)))
        elif name and "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(after(name)))
    try:
        run_layer(model, index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return groups, norms


def _preserves(
    model: StreamedModel, index: int, fold: Fold, hidden: Tensor, expected: Tensor, generator: torch.Generator
) -> bool:
    """Whether folding random scales into the producer leaves the layer the same function.

    Powers of two make a true fold exact, and what the scales do to the layer without the fold is the measure.
    """
    layer = model.layers[index]
    producer = layer.get_submodule(fold.producer)
    channel = fold_channels(model, index, fold)
    if channel is None:
        return False
    touched = {fold.producer, *fold.readers}
    saved = {n: p.clone() for n, p in layer.named_parameters() if n.rpartition(".")[0] in touched}
    scale = torch.exp2(torch.randint(-2, 3, (int(channel.max()) + 1,), generator=generator).float())
    for name in fold.readers:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.mul_(scale[channel])
    unfolded = _distance(run_layer(model, index, hidden), expected)
    divide_producer(fold, producer, scale)
    folded = _distance(run_layer(model, index, hidden), expected)
    assign(layer, saved)
    return folded < 1e-4 * unfolded


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def divide_producer(fold: Fold, producer: nn.Module, scale: Tensor) -> None:
    """Divide the outputs of a norm or linear by scale [channels], in place: its weight's rows, and its bias."""
    for name in ("weight", "bias"):
        parameter = getattr(producer, name, None)
        if isinstance(parameter, Tensor):
            parameter.copy_(divided(fold, name, parameter, scale))


def divided(fold: Fold, name: str, parameter: Tensor, scale: Tensor) -> Tensor:
    """A parameter ("weight" or "bias") of the producer with which its outputs are divided by scale [channels]."""
    rows = scale if parameter.dim() == 1 else scale.unsqueeze(1)
    return (parameter + fold.plus) / rows - fold.plus if fold.plus and name == "weight" else parameter / rows


def fold_channels(model: StreamedModel, index: int, fold: Fold | None) -> Tensor | None:
    """For each input column of the readers, the producer's channel that feeds it; None when nothing absorbs a scale."""
    if fold is None:
        return None
    layer, config = model.layers[index], model.layer_config(index)
    linear, producer = layer.get_submodule(fold.readers[0]), layer.get_submodule(fold.producer)
    if not isinstance(getattr(producer, "weight", None), Tensor):
        return None
    assert isinstance(linear, nn.Linear)
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return producer_channels(linear.in_features, producer, head_dim)


def producer_channels(in_features: int, producer: nn.Module, head_dim: int) -> Tensor | None:
    """Which output channel of the producer feeds each input column, int64 [in_features]; None if that is unknown.

    With grouped-query attention one value head serves several query heads, so their columns share its channels.
    """
    weight = producer.weight
    assert isinstance(weight, Tensor)
    channels = weight.shape[0]
    if channels == in_features:
        return torch.arange(in_features)
    if not isinstance(producer, nn.Linear) and in_features % channels == 0:  # a norm within each head
        return torch.arange(channels).repeat(in_features // channels)
    if not isinstance(producer, nn.Linear) or in_features % channels or channels % head_dim:
        return None
    heads, repeats = channels // head_dim, in_features // channels
    return torch.arange(channels).view(heads, 1, head_dim).expand(heads, repeats, head_dim).reshape(-1)
