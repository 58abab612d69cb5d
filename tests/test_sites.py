# SPDX-License-Identifier: Apache-2.0
"""Which linears share an input, and which folds leave the layer the same function."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from quantkit.errors import ModelError
from quantkit.model.architectures import FAMILIES
from quantkit.model.family import EVERY, Fold, Site, folded_site
from quantkit.model.sites import (
    _preserves,
    discover_sites,
    divide_producer,
    fold_channels,
    producer_channels,
    sites_of,
)
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    embed,
    open_model,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
)
from tests.tiny import as_float, random_ids, save_tiny

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 without grouped queries": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with one value head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 8}),
}
DELTA_NET = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", DELTA_NET | {"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}),
    "qwen3_5_text": ("qwen3_5_text", DELTA_NET),
    "lfm2": ("lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 24,
            "mamba_d_state": 8,
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
        },
    ),
}
V_TO_O = folded_site("self_attn.v_proj", "self_attn.o_proj")
UP_TO_DOWN = folded_site("mlp.up_proj", "mlp.down_proj")
QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
ROWLESS: dict[str, tuple[dict[str, Any], tuple[Site, ...]]] = {
    # norms that multiply by 1 + w
    "gemma": (
        {"head_dim": 16},
        (
            folded_site("input_layernorm", *QKV, plus=1),
            V_TO_O,
            folded_site("post_attention_layernorm", *GATE_UP, plus=1),
            UP_TO_DOWN,
        ),
    ),
    "gemma2": (
        {"head_dim": 16},
        (
            folded_site("input_layernorm", *QKV, plus=1),
            V_TO_O,
            folded_site("pre_feedforward_layernorm", *GATE_UP, plus=1),
            UP_TO_DOWN,
        ),
    ),
    # norms that stand behind the linears
    "olmo2": ({}, (Site(QKV), V_TO_O, Site(GATE_UP), UP_TO_DOWN)),
    # fused linears: what they feed reads only a part of their outputs
    "phi3": (
        {},
        (
            folded_site("input_layernorm", "self_attn.qkv_proj"),
            Site(("self_attn.o_proj",)),
            folded_site("post_attention_layernorm", "mlp.gate_up_proj"),
            Site(("mlp.down_proj",)),
        ),
    ),
    # one norm for attention and MLP, side by side
    "cohere": ({}, (folded_site("input_layernorm", *QKV, *GATE_UP), V_TO_O, UP_TO_DOWN)),
    # LayerNorm with a bias; a ReLU passes positive scales on, a GELU does not
    "opt": (
        {"ffn_dim": 96, "word_embed_proj_dim": 48},
        (
            folded_site("self_attn_layer_norm", *QKV),
            folded_site("self_attn.v_proj", "self_attn.out_proj"),
            folded_site("final_layer_norm", "fc1"),
            folded_site("fc1", "fc2"),
        ),
    ),
    "starcoder2": (
        {},
        (
            folded_site("input_layernorm", *QKV),
            V_TO_O,
            folded_site("post_attention_layernorm", "mlp.c_fc"),
            Site(("mlp.c_proj",)),
        ),
    ),
}


def normalised(sites: tuple[Site, ...]) -> set[tuple[frozenset[str], str | None, int]]:
    """Sites without the order of linears that read the same tensor, which an architecture may choose freely."""
    return {
        (frozenset(site.linears), site.fold.producer if site.fold else None, site.fold.plus if site.fold else 0)
        for site in sites
    }


@pytest.mark.parametrize("name", ROWS | HYBRIDS)
def test_watching_finds_the_row_of_the_family(name: str, tmp_path: Path) -> None:
    kind, changes = (ROWS | HYBRIDS)[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = open_model(save_tiny(tmp_path, kind, **changes))
    assert discover_sites(model) == sites_of(model) == tuple(model.known_sites())
    assert len(set(sites_of(model))) == (2 if name in HYBRIDS else 1)
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize("kind", ROWLESS)
def test_a_family_without_a_row_gets_the_folds_that_are_exact(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    changes, expected = ROWLESS[kind]
    for found in sites_of(open_model(save_tiny(tmp_path, kind, **changes))):
        assert normalised(found) == normalised(expected)


def test_every_linear_of_a_layer_is_in_one_site_in_execution_order() -> None:
    for sites in (family.sites(kind) for family in FAMILIES.values() for kind in family.layers):
        names = [name for site in sites for name in site.linears]
        assert len(names) == len(set(names))
        for position, site in enumerate(sites):
            earlier = {name for before in sites[:position] for name in before.linears}
            if site.fold is not None:
                assert site.fold.readers == site.linears
                assert site.fold.producer in earlier or "norm" in site.fold.producer


def test_a_layer_with_other_linears_than_the_first_is_refused(tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2"))
    last = {**model.layer_linears[2], "mlp.extra": (4, 4)}
    model = replace(model, layer_linears=(*model.layer_linears[:2], last))
    with pytest.raises(ModelError, match=r"model\.layers\.2: linears mlp\.extra do not fit the sites of qwen2"):
        sites_of(model)


# ---------------------------------------------------------------- folds, in float64


def in_float64(model: StreamedModel, index: int) -> tuple[Tensor, nn.Module]:
    """The hidden states that enter a layer, and that layer, both in float64."""
    with torch.no_grad(), outside_loaded(model, as_float(read_outside(model))):
        hidden = embed(model, random_ids(2)).double()
    layer = model.layers[index]
    assign(layer, {name: tensor.double() for name, tensor in read_layer(model, index).items()})
    model.calls[2, 24] = [
        (args, {name: doubled(value) for name, value in kwargs.items()}) for args, kwargs in model.calls[2, 24]
    ]
    return hidden, layer


def doubled(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("position", range(4))
@torch.no_grad()
def test_scales_folded_into_the_producer_leave_the_layer_the_same_function(
    name: str, position: int, tmp_path: Path
) -> None:
    kind, changes = ROWS[name]
    model = open_model(save_tiny(tmp_path, kind, **changes))
    fold = FAMILIES[kind].sites(EVERY)[position].fold
    assert fold is not None
    hidden, layer = in_float64(model, 1)
    expected = run_layer(model, 1, hidden)
    channel = fold_channels(model, 1, fold)
    assert channel is not None
    producer = layer.get_submodule(fold.producer)
    generator = torch.Generator().manual_seed(2)
    scale = torch.exp(torch.randn(len(producer.get_parameter("weight")), generator=generator, dtype=torch.float64))
    for linear in fold.readers:
        layer.get_parameter(f"{linear}.weight").mul_(scale[channel])
    assert float((run_layer(model, 1, hidden) - expected).abs().max()) > 1e-2  # the scale matters
    divide_producer(fold, producer, scale)
    torch.testing.assert_close(run_layer(model, 1, hidden), expected, rtol=1e-5, atol=1e-6)


def wrong_folds() -> list[Fold]:
    return [
        Fold("self_attn.q_proj", ("self_attn.o_proj",)),
        Fold("mlp.gate_proj", ("mlp.down_proj",)),
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),  # v reads it too
        Fold("input_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Fold("self_attn.q_norm", ("mlp.down_proj",)),  # of another width
    ]


@pytest.mark.parametrize("fold", wrong_folds(), ids=str)
@torch.no_grad()
def test_folds_that_change_the_function_are_rejected_and_undone(fold: Fold, tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen3", head_dim=12))
    with outside_loaded(model, as_float(read_outside(model))):
        hidden = embed(model, random_ids(1))
    tensors = as_float(read_layer(model, 0))
    assign(model.layers[0], tensors)
    expected = run_layer(model, 0, hidden)
    generator = torch.Generator().manual_seed(0)
    assert not _preserves(model, 0, fold, hidden, expected, generator)
    for good in FAMILIES["qwen3"].sites(EVERY):
        assert good.fold is not None
        assert _preserves(model, 0, good.fold, hidden, expected, generator)
    torch.testing.assert_close(run_layer(model, 0, hidden), expected, rtol=0, atol=0)


def test_a_large_residual_hides_no_wrong_fold(tmp_path: Path) -> None:
    """Massive activations make a site's share of the output small; the share is what must be preserved."""
    model = open_model(save_tiny(tmp_path, "qwen2"))
    with torch.no_grad(), outside_loaded(model, as_float(read_outside(model))):
        hidden = embed(model, random_ids(1))
        hidden[..., 3] += 3e3
        assign(model.layers[0], as_float(read_layer(model, 0)))
        expected = run_layer(model, 0, hidden)
        wrong = Fold("mlp.gate_proj", ("mlp.down_proj",))
        assert not _preserves(model, 0, wrong, hidden, expected, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("in_features", "expected"),
    [(12, [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_channels_of_a_value_head_serve_its_query_heads(in_features: int, expected: list[int]) -> None:
    channel = producer_channels(in_features, nn.Linear(8, 6), 3)  # 2 value heads of 3
    assert channel is not None
    assert channel.tolist() == expected


def test_channels_of_a_norm_within_heads_repeat() -> None:
    channel = producer_channels(6, nn.LayerNorm(3), 2)
    assert channel is not None
    assert channel.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("producer", "in_features", "head_dim"),
    [
        (nn.Linear(8, 6), 9, 3),  # not a multiple
        (nn.Linear(8, 6), 12, 4),  # not whole heads
        (nn.Linear(8, 24), 12, 3),  # more channels than columns
        (nn.LayerNorm(6), 15, 3),  # no whole heads of a norm within heads
    ],
)
def test_channels_that_are_unknown_absorb_nothing(producer: nn.Module, in_features: int, head_dim: int) -> None:
    assert producer_channels(in_features, producer, head_dim) is None
