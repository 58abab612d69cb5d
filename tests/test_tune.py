# SPDX-License-Identifier: Apache-2.0
"""Tuning by gradients: what it lowers, what it may not change, and that its gradients are those of a plain formula."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.grids.base import Levels, Spacing
from quantkit.grids.registry import dequantize
from quantkit.methods import rtn
from quantkit.methods.tune import INSIDE, _dequantize, offsets, tune
from quantkit.scheme import QuantizedTensor, Scheme, expand


def problem(scheme: Scheme, rows: int = 24) -> tuple[Tensor, Tensor, QuantizedTensor]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(rows, 128, generator=generator)
    inputs = torch.randn(256, 128, generator=generator) * torch.exp(torch.randn(128, generator=generator))
    return weight, inputs, rtn.quantize(weight, scheme)


@pytest.mark.parametrize("scheme", [Scheme(2, 32, True), Scheme(3, 64, False), Scheme(4, 128, True)])
def test_the_loss_of_the_outputs_falls(scheme: Scheme) -> None:
    weight, inputs, before = problem(scheme)
    wanted = inputs @ weight.T

    def loss(weights: Mapping[str, Tensor]) -> Tensor:
        return (inputs @ weights["w"].T - wanted).square().mean() / wanted.square().mean()

    after = tune({"w": before}, {"w": offsets(weight, before)}, [loss] * 64)["w"]
    assert float(loss({"w": dequantize(after)})) < 0.95 * float(loss({"w": dequantize(before)}))
    assert torch.equal(after.zeros, before.zeros)
    assert int(after.codes.max()) <= scheme.max_code
    assert torch.equal(after.scales.sign(), before.scales.sign())


def test_without_a_gradient_nothing_moves() -> None:
    weight, _, before = problem(Scheme(3, 64, False))
    after = tune({"w": before}, {"w": offsets(weight, before)}, [lambda weights: weights["w"].sum() * 0] * 3)["w"]
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scales, before.scales)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), spread=st.floats(0.01, 10))
def test_a_start_is_rounded_to_the_code_it_starts_from(bits: int, symmetric: bool, spread: float) -> None:
    weight, _, quantized = problem(Scheme(bits, 32, symmetric), rows=4)
    start = offsets(spread * weight, quantized)
    assert float(start.abs().max()) <= INSIDE + 1e-3
    assert torch.equal((quantized.codes + start.float()).round(), quantized.codes.float())


def test_gradients_are_those_of_codes_times_scale_where_rounding_is_the_identity() -> None:
    generator = torch.Generator().manual_seed(1)
    position = 7 * torch.rand(3, 8, generator=generator)
    position[0, 0], position[1, 1] = -0.8, 7.9  # beyond the last codes: no way on, no gradient
    scale, zero = torch.rand(3, 2, generator=generator) + 0.1, torch.tensor([[3.0, 2], [1, 0], [4, 7]])
    upstream = torch.randn(3, 8, generator=generator)
    moved, fitted = position.clone().requires_grad_(), scale.clone().requires_grad_()
    (_dequantize(moved, fitted, Spacing(scale, zero), Levels(7), torch.float32) * upstream).sum().backward()
    codes, plain = position.round().clamp(0, 7).requires_grad_(), scale.clone().requires_grad_()
    ((codes - expand(zero, 4)) * expand(plain, 4) * upstream).sum().backward()
    assert moved.grad is not None
    assert codes.grad is not None
    inside = (position > -0.5) & (position < 7.5)
    torch.testing.assert_close(moved.grad, codes.grad * inside)
    torch.testing.assert_close(fitted.grad, plain.grad)
    assert not bool(inside[0, 0])
    assert not bool(inside[1, 1])
