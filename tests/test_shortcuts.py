# SPDX-License-Identifier: Apache-2.0
"""A layer that starts where something is known comes to the very same numbers as one that runs from its beginning."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.hardware.matmul import fast_linears
from quantkit.model.architectures import FAMILIES
from quantkit.model.family import EVERY, Site, folded_site
from quantkit.model.shortcuts import Known, Shortcut, find_shortcuts, taken, watched
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    embed,
    open_model,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
    run_to,
)
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import Layer
from quantkit.pipeline.runtime import Runtime, Silent
from quantkit.pipeline.site_inputs import Passage, forget, inputs_of, shortcuts_of
from tests.tiny import as_float, random_ids, save_tiny

LINEARS = ["self_attn.o_proj", "mlp.down_proj"]


@contextmanager
def layer_of(folder: Path, kind: str, **changes: Any) -> Iterator[tuple[StreamedModel, Tensor]]:
    """A model with its layer 0 materialised, and what enters it."""
    model = open_model(save_tiny(folder, kind, **changes))
    with torch.no_grad(), outside_loaded(model, as_float(read_outside(model))):
        hidden = embed(model, random_ids(4)[:1])
        hidden = torch.cat([embed(model, part) for part in random_ids(4).split(1)])
        assign(model.layers[0], as_float(read_layer(model, 0)))
        yield model, hidden


def materialised(model: StreamedModel, sites: tuple[Site, ...] = ()) -> Layer:
    """Layer 0, which `layer_of` has materialised."""
    return Layer(Runtime(model, torch.device("cpu"), model.directory), 0, Silent(), sites)


def rough(hidden: Tensor, batch: int = 1) -> Stream:
    """A stream that calibrates."""
    return Stream(hidden.clone(), "ram", batch, exact=False)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_attention_and_mlp_answer_from_what_their_last_linear_reads(tmp_path: Path, kind: str) -> None:
    with layer_of(tmp_path, kind) as (model, hidden):
        found = find_shortcuts(model, 0, hidden[:1], LINEARS)
        assert [(x.module, x.linear) for x in found] == [("self_attn", LINEARS[0]), ("mlp", LINEARS[1])]
        with watched(model.layers[0], LINEARS) as (seen, _):
            expected = run_layer(model, 0, hidden[:1])
        read = {shortcut: Known(seen[shortcut.linear]) for shortcut in found}
        linears = ["self_attn.q_proj", "mlp.up_proj"]
        with taken(model.layers[0], read), watched(model.layers[0], linears, LINEARS) as (ran, made):
            assert torch.equal(run_layer(model, 0, hidden[:1]), expected)
        assert (list(made), list(ran)) == (LINEARS, [])
        returned = {shortcut: Known(made[shortcut.linear], returned=True) for shortcut in found}
        with taken(model.layers[0], returned), watched(model.layers[0], linears + LINEARS) as (ran, _):
            assert torch.equal(run_layer(model, 0, hidden[:1]), expected)
        assert not ran
        assert not any("forward" in vars(module) for module in model.layers[0].modules())


def test_attention_that_returns_more_than_its_projection_is_run(tmp_path: Path) -> None:
    with layer_of(tmp_path, "qwen2") as (model, hidden):
        attention = model.layers[0].get_submodule("self_attn")
        original = attention.forward

        def with_its_weights(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
            return original(*args, **kwargs)[0], torch.ones(1)

        attention.forward = with_its_weights  # as gemma2's is, in some versions of transformers
        assert [x.module for x in find_shortcuts(model, 0, hidden[:1], LINEARS)] == ["mlp"]


def test_a_module_that_changes_what_its_linear_returns_is_run(tmp_path: Path) -> None:
    with layer_of(tmp_path, "qwen2") as (model, hidden):
        attention = model.layers[0].get_submodule("self_attn")
        original = attention.forward

        def doubled(*args: object, **kwargs: object) -> tuple[Tensor, None]:
            return 2 * original(*args, **kwargs)[0], None

        attention.forward = doubled
        assert find_shortcuts(model, 0, hidden[:1], LINEARS) == (Shortcut("mlp", LINEARS[1], None),)


def test_what_is_kept_makes_no_difference(tmp_path: Path) -> None:
    sites = FAMILIES["qwen2"].sites(EVERY)
    with layer_of(tmp_path, "qwen2") as (model, hidden):
        stream = rough(hidden)
        layer = materialised(model, sites)
        shortcuts = shortcuts_of(layer, stream, 96)
        assert [x.linear for x in shortcuts] == LINEARS
        assert [x.linear for x in shortcuts_of(layer, stream, 48)] == LINEARS[:1]
        assert shortcuts_of(layer, stream, 0) == ()
        keeping, forgetting = (Passage(layer, stream, 4, these) for these in (shortcuts, ()))
        for site in sites:
            pairs = [list(inputs_of(passage, site.linears[0])) for passage in (keeping, forgetting)]
            assert len(pairs[0]) == 4
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        assert {shortcut.linear: known.returned for shortcut, known in keeping.known.items()} == {
            LINEARS[0]: True,
            LINEARS[1]: False,
        }
        pairs = [list(inputs_of(p, LINEARS[1], returned=True)) for p in (keeping, forgetting)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        assert not forgetting.known
        assert torch.equal(stream.states, hidden)
        layer.advance(stream, known=keeping.known)
        left = [run_layer(model, 0, part, exact=False) for part in hidden.split(1)]
        assert torch.equal(stream.states, torch.cat(left))


def test_the_original_leaves_the_layer_with_its_last_site(tmp_path: Path) -> None:
    with layer_of(tmp_path, "qwen2") as (model, hidden):
        weights = {name: 1.5 * tensor for name, tensor in model.layers[0].named_parameters()}
        stream = rough(hidden, 2)
        embed(model, random_ids(2))  # shows what layers are called with at this micro-batch
        passage = Passage(materialised(model), stream, 2, (), weights, run_to_end=True)
        assert torch.equal(
            next(inputs_of(passage, LINEARS[0])),
            run_to(model, 0, hidden[:2], LINEARS[0], weights, exact=False)[0],
        )
        assert torch.equal(stream.states, hidden)
        list(inputs_of(passage, LINEARS[1], last=True))
        assert passage.finished == 2
        assert torch.equal(stream.states[:2], run_layer(model, 0, hidden[:2], weights, exact=False))
        assert torch.equal(stream.states[2:], hidden[2:])


@pytest.mark.parametrize(
    ("producer", "left"),
    [
        ("mlp.up_proj", LINEARS[:1]),  # changes what the MLP's last linear reads
        ("self_attn.o_proj", []),  # changes what it returns itself, and all after it
        ("self_attn.v_proj", []),
        ("post_attention_layernorm", LINEARS[:1]),
    ],
)
def test_what_a_fold_changes_is_forgotten(tmp_path: Path, producer: str, left: list[str]) -> None:
    sites = FAMILIES["qwen2"].sites(EVERY)
    with layer_of(tmp_path, "qwen2") as (model, hidden):
        stream = rough(hidden)
        changed = folded_site(producer, *sites[2].linears)
        layer = materialised(model, (*sites[:2], changed, sites[3]))
        passage = Passage(layer, stream, 3, shortcuts_of(layer, stream, 96))
        for site in sites:
            list(inputs_of(passage, site.linears[0]))
        forget(passage, changed)
        assert [shortcut.linear for shortcut in passage.known] == left


@pytest.mark.parametrize(
    ("kind", "changes", "linear"),
    [("qwen2", {}, LINEARS[1]), ("falcon", {"num_kv_heads": 1}, "mlp.dense_4h_to_h")],
)
def test_what_a_linear_returns_is_given_as_it_was(
    tmp_path: Path, kind: str, changes: dict[str, object], linear: str
) -> None:
    """Falcon adds its attention's output to it in place."""
    with layer_of(tmp_path, kind, **changes) as (model, hidden):
        passage = Passage(materialised(model), rough(hidden), 4)
        read = list(inputs_of(passage, linear, last=True))
        returned = list(inputs_of(passage, linear, last=True, returned=True))
        with fast_linears(hidden, exact=False):
            made = model.layers[0].get_submodule(linear)(torch.cat(read))
        torch.testing.assert_close(torch.cat(returned), made)
        assert torch.equal(passage.stream.states, hidden)
