# SPDX-License-Identifier: Apache-2.0
"""Products against float64, in whatever pieces they are made."""

import pytest
import torch

from quantkit.hardware import matmul
from quantkit.hardware.matmul import (
    accumulate_,
    accumulate_gram_,
    fast_bfloat16,
    fast_linears,
    mirror_,
    product,
    rounded,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", [33, 1000])  # torch asks oneDNN for larger sums only
def test_a_sum_of_products_is_that_of_float64(exact: bool, rows: int) -> None:
    """In place, on a part of something larger, of tensors that lie turned."""
    whole, left, right = random(40, 70), random(30, rows, seed=1).T, random(rows, 50, seed=2)
    before = whole.clone()
    part = whole[5:35, 10:60]
    expected = part.double() + left.double().T @ right.double()
    assert accumulate_(part, left, right, exact=exact) is part
    tolerance = 1e-6 if exact or not fast_bfloat16() else 1e-2
    assert float((part - expected).norm()) < tolerance * float(expected.norm())
    part.copy_(before[5:35, 10:60])
    assert torch.equal(whole, before)


@pytest.mark.skipif(not fast_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("at_once", [1, 90, 1 << 24])
def test_a_rounded_product_is_the_same_in_any_pieces(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    left, right = random(33, 5, seed=1), random(33, 40, seed=2)
    expected = accumulate_(torch.zeros(5, 40), left, right, exact=False)
    monkeypatch.setattr(matmul, "PRODUCT_AT_ONCE", at_once)
    for x in (right, rounded(right)):
        assert torch.equal(accumulate_(torch.zeros(5, 40), left, x, exact=False), expected)


def test_torch_is_left_as_it_was() -> None:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(settings, "fp32_precision", None)
    accumulate_gram_(torch.zeros(300, 300), random(70, 300))
    with pytest.raises(RuntimeError):
        accumulate_(torch.zeros(3, 4), random(5, 3), random(5, 5))
    assert getattr(settings, "fp32_precision", None) == before


@pytest.mark.parametrize("columns", [1, 100, 300, 1100])
def test_a_gram_matrix_is_made_by_halves(columns: int) -> None:
    x = random(70, columns)
    gram = mirror_(accumulate_gram_(torch.zeros(columns, columns), x))
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)


def test_linears_of_any_module_are_multiplied_the_fast_way() -> None:
    linear, x = torch.nn.Linear(30, 40), random(2, 5, 30)
    expected = x.double() @ linear.weight.double().T + linear.bias.double()
    with torch.no_grad(), fast_linears(x):
        found = linear(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-6), (False, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_torch(exact: bool, tolerance: float, bias: bool) -> None:
    linear, x, upstream = torch.nn.Linear(30, 40, bias), random(2, 5, 30).requires_grad_(), random(2, 5, 40, seed=1)
    wanted = [x, *linear.parameters()]
    expected = torch.autograd.grad(linear(x), wanted, upstream)
    with fast_linears(x, exact=exact):
        found = torch.autograd.grad(linear(x), wanted, upstream)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) < tolerance * float(b.norm())


def test_nothing_times_something() -> None:
    assert product(random(0, 3), random(3, 4)).shape == (0, 4)
