# SPDX-License-Identifier: Apache-2.0
"""Which errors of a layer's output matter: held against what they do to the predictions when they are made."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    embed,
    logits,
    open_model,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
)
from quantkit.pipeline.fisher import output_directions, weighted_square
from quantkit.pipeline.resample import SHARE, resample
from quantkit.pipeline.runtime import Runtime, Silent
from tests.tiny import as_float, random_ids, save_tiny

CPU = torch.device("cpu")


def tokens(samples: int) -> TokenSet:
    return TokenSet(random_ids(samples), "random", "random", "random")


@torch.no_grad()
def predictions(model: StreamedModel, ids: Tensor, layer: int, error: Tensor) -> Tensor:
    """log p [samples, seqlen, vocab] when `error` [samples, seqlen, hidden] is added to the output of a layer."""
    outside = as_float(read_outside(model))
    with outside_loaded(model, outside):
        hidden = embed(model, ids)
    for index in range(len(model.layers)):
        assign(model.layers[index], as_float(read_layer(model, index)))
        hidden = run_layer(model, index, hidden) + (error if index == layer else 0)
    with outside_loaded(model, outside):
        return logits(model, hidden).log_softmax(-1)


@pytest.mark.parametrize("layer", [0, 2])
def test_errors_change_the_predictions_as_much_as_their_weight_says(tmp_path: Path, layer: int) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2", hidden_size=16, intermediate_size=32))
    found = output_directions(Runtime(model, CPU, tmp_path), tokens(128), Silent())
    assert [tuple(v.shape) for v in found] == [(16, 15)] * 3
    ids = random_ids(16)
    generator = torch.Generator().manual_seed(2)
    exact = predictions(model, ids, layer, torch.zeros(()))
    vectors, _, _ = torch.linalg.svd(found[layer])  # the first moves the predictions most, the last least
    ratios = []
    for direction in vectors.T[[0, 4, 8, -1]]:
        error = 0.01 * torch.randn(*ids.shape, 1, generator=generator) * direction
        log_q = predictions(model, ids, layer, error)
        divergence = (exact.exp() * (exact - log_q)).sum(-1).mean()
        ratios.append(float(divergence / weighted_square(error, found[layer])))
    assert max(ratios) < 1.5 * min(ratios), ratios
    spread = [float(weighted_square(v, found[layer])) for v in vectors.T[[0, -1]]]
    assert spread[0] > 3 * spread[1]  # so that the bound above says something


def test_the_weight_of_an_even_error_is_its_square() -> None:
    directions = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    even = torch.eye(8)  # one error in each direction
    torch.testing.assert_close(weighted_square(even, directions), even.square().sum(-1).mean())


def test_a_copy_is_made_of_the_copy_before_it(tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2"))
    given = tokens(40)
    copies = resample(Runtime(model, CPU, tmp_path), given, 2, Silent()).split(40)
    first, second = (float((a != b).float().mean()) for a, b in ((copies[0], given.input_ids), (copies[1], copies[0])))
    far = float((copies[1] != given.input_ids).float().mean())
    assert 0.7 * SHARE < first < SHARE
    assert 0.7 * SHARE < second < SHARE
    assert far > 1.3 * first
    assert torch.equal(copies[1][:, 0], given.input_ids[:, 0])
