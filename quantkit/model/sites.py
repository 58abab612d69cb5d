# SPDX-License-Identifier: Apache-2.0
"""The sites of a model: the row of its family, or what watching one forward pass shows."""

from collections.abc import Callable, Sequence
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
    sites = FAMILIES.get(model.config.model_type) or discover_sites(model)
    known = {name for site in sites for name in site.linears}
    for index, layer in enumerate(model.layers):
        found = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        if found != known:
            raise ModelError(
                f"{model.layer_name(index)}: linears {sorted(found ^ known)} do not fit the sites of {model.config.model_type}"
            )
    return sites


def discover_sites(model: StreamedModel) -> tuple[Site, ...]:
    """Find the linears of a layer that read the very same tensor, and the norms that can absorb a scale.

    A fold is believed only when it was tried: with the norm divided and the linears multiplied by random scales, the
    layer must compute the same function.
    """
    generator = torch.Generator().manual_seed(0)
    outside = {name: tensor.float() for name, tensor in read_outside(model).items()}
    with torch.no_grad(), outside_loaded(model, outside):
        ids = torch.randint(model.config.vocab_size, (1, 16), generator=generator)
        hidden = embed(model, ids)
        layer = model.layers[0]
        assign(layer, {n: t.float() if t.is_floating_point() else t for n, t in read_layer(model, 0).items()})
        try:
            groups, makers = _watch(model, hidden)
            before = run_layer(model, 0, hidden)
            return tuple(
                Site(tuple(names), _foldable(model, hidden, before, names, makers.get(key), generator))
                for key, names in groups.items()
            )
        finally:
            drop(layer)


def _watch(model: StreamedModel, hidden: Tensor) -> tuple[dict[int, list[str]], dict[int, str]]:
    groups: dict[int, list[str]] = {}
    makers: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            groups.setdefault(args[0].data_ptr(), []).append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                makers[output.data_ptr()] = name

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
    return groups, makers


def _foldable(
    model: StreamedModel,
    hidden: Tensor,
    expected: Tensor,
    linears: Sequence[str],
    norm: str | None,
    generator: torch.Generator,
) -> str | None:
    if norm is None:
        return None
    layer = model.layers[0]
    producer = layer.get_submodule(norm)
    weight = getattr(producer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    saved = {n: p.clone() for n, p in layer.named_parameters()}
    scale = torch.exp2(torch.randint(-2, 3, weight.shape, generator=generator).float())
    divide_producer(producer, scale)
    for name in linears:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.mul_(scale)
    same = torch.allclose(run_layer(model, 0, hidden), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assign(layer, saved)
    return norm if same else None


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
    layer = model.layers[index]
    linear = layer.get_submodule(site.linears[0])
    assert isinstance(linear, nn.Linear)
    heads = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    return producer_channels(linear.in_features, layer.get_submodule(site.producer), head_dim)
