# SPDX-License-Identifier: Apache-2.0
"""What is won after GPTQ, against the same descents written out one weight and one group at a time in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantkit.grids.registry import dequantize
from quantkit.methods import gptq, refine, rtn
from quantkit.methods.gptq import factorize
from quantkit.scheme import QuantizedTensor, Scheme, expand
from quantkit.stats import output_error
from tests.test_gptq import correlated, gram_of, weights

SCHEMES = [Scheme(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
DAMP = 0.01


def objective(weight: Tensor, quantized: QuantizedTensor, gram: Tensor) -> float:
    """tr((W - Q)(H + ridge I)(W - Q)^T) in float64: what no step may raise."""
    difference = weight.double() - dequantize(quantized).double()
    damped = gram.double() + DAMP * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return float(((difference @ damped) * difference).sum())


def refined(weight: Tensor, quantized: QuantizedTensor, gram: Tensor, rounds: int = 1) -> QuantizedTensor:
    return refine.refine(weight, quantized, gram, damp=DAMP, rounds=rounds)[0]


def oracle(weight: Tensor, start: QuantizedTensor, gram: Tensor, rounds: int) -> QuantizedTensor:
    """The same steps, each from the definition of its minimum."""
    scheme, columns = start.scheme, start.in_features // start.scales.shape[1]
    damped = gram.double() + DAMP * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    zeros = expand(start.zeros.double(), columns)
    steps, scales, w = start.codes.double() - zeros, start.scales.double(), weight.double()

    def refit(group: int, part: slice) -> None:
        difference = w - steps * expand(scales, columns)
        for row in range(len(w)):
            x = steps[row, part]
            curvature = float(x @ damped[part, part] @ x)
            if curvature > 0:
                wanted = scales[row, group] + float(x @ (difference[row] @ damped)[part]) / curvature
                if wanted * scales[row, group] > 0:
                    scales[row, group] = wanted.half().double()

    def descend(j: int) -> None:
        difference = w - steps * expand(scales, columns)
        scale = expand(scales, columns)[:, j]
        best = steps[:, j] + (difference @ damped[:, j]) / damped[j, j] / scale
        steps[:, j] = torch.maximum(torch.minimum(torch.round(best), scheme.max_code - zeros[:, j]), -zeros[:, j])

    for _ in range(rounds):
        for group in range(scales.shape[1]):
            refit(group, slice(group * columns, (group + 1) * columns))
            for j in range(group * columns, (group + 1) * columns):
                descend(j)
    return QuantizedTensor((steps + zeros).to(torch.uint8), scales.half(), start.zeros, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_blocked_descents_are_those_of_the_definition(scheme: Scheme) -> None:
    weight, gram = weights(4, 160), gram_of(correlated(700, 160))
    start = rtn.quantize(weight, scheme, energy=gram.diagonal())
    found, expected = refined(weight, start, gram), oracle(weight, start, gram, 1)
    assert float((found.codes != expected.codes).double().mean()) <= 0.02  # ties, and what follows from them
    assert objective(weight, found, gram) == pytest.approx(objective(weight, expected, gram), rel=0.02)


@pytest.mark.parametrize("after_gptq", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_round_raises_the_error(scheme: Scheme, after_gptq: bool) -> None:
    weight, gram = weights(8, 160), gram_of(correlated(700, 160))
    if after_gptq:
        start = gptq.quantize(weight, scheme, factorize(gram), energy=gram.diagonal())
    else:
        start = rtn.quantize(weight, scheme, energy=gram.diagonal())
    errors = [objective(weight, refined(weight, start, gram, rounds), gram) for rounds in range(4)]
    assert errors[0] == objective(weight, start, gram)
    assert errors[1] < errors[0]
    for before, after in pairwise(errors):
        assert after <= before * 1.001  # scales are rounded to float16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_result_is_one_that_a_format_can_hold(scheme: Scheme) -> None:
    weight, gram = weights(8, 96), gram_of(correlated(300, 96))
    start = rtn.quantize(weight, scheme, energy=gram.diagonal())
    copies = start.codes.clone(), start.scales.clone(), gram.clone(), weight.clone()
    found = refined(weight, start, gram, 2)
    assert (found.codes.dtype, found.scales.dtype, found.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert int(found.codes.max()) <= scheme.max_code
    assert torch.equal(found.zeros, start.zeros)
    assert torch.equal(found.scales.sign(), start.scales.sign())
    assert bool(torch.isfinite(found.scales).all())
    now = start.codes, start.scales, gram, weight
    assert all(torch.equal(before, after) for before, after in zip(copies, now, strict=True))


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_that_is_told_is_that_of_the_result(scheme: Scheme, rounds: int) -> None:
    inputs, weight = correlated(300, 96), weights(8, 96)
    inputs[:, [3, 50]] = 0
    gram = gram_of(inputs)
    start = gptq.quantize(weight, scheme, factorize(gram), energy=gram.diagonal())
    found, told = refine.refine(weight, start, gram, damp=DAMP, rounds=rounds)
    expected = output_error((dequantize(found) - weight).double(), gram)
    torch.testing.assert_close(told, expected, rtol=1e-3, atol=1e-6 * float(output_error(weight, gram).max()))


def test_groups_of_zeros_and_dead_columns_stay_finite() -> None:
    inputs, weight, scheme = correlated(300, 96), weights(4, 96), Scheme(4, 32, True)
    inputs[:, :40] = 0
    weight[:, 64:] = 0
    gram = gram_of(inputs)
    start = gptq.quantize(weight, scheme, factorize(gram), energy=gram.diagonal())
    assert bool(torch.isfinite(dequantize(refined(weight, start, gram, 2))).all())


def test_a_silent_site_is_refined_to_something_finite() -> None:
    weight, gram, scheme = weights(4, 64), torch.zeros(64, 64), Scheme(4, 32, False)
    start = gptq.quantize(weight, scheme, factorize(gram), energy=gram.diagonal())
    assert bool(torch.isfinite(dequantize(refined(weight, start, gram, 1))).all())


def test_no_damping_and_dead_columns_stay_sound() -> None:
    """A column without energy has no best value: it must stay at zero, not spread 0/0 over its block."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 64, generator=generator)
    inputs[:, 5] = 0
    gram, weight = inputs.T @ inputs, torch.randn(16, 64, generator=generator)
    scheme = Scheme(4, 32, False)
    factor = gptq.factorize(gram, damp=0.0)
    once = gptq.quantize(weight, scheme, factor, energy=gram.diagonal())
    better, _ = refine.refine(weight, once, gram, damp=0.0, rounds=2)
    assert not dequantize(better)[:, 5].any()
    before, after = (output_error(dequantize(q) - weight, gram).sum() for q in (once, better))
    assert after < before
