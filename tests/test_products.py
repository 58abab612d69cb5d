# SPDX-License-Identifier: Apache-2.0
"""Products against float64, in whatever pieces they are made."""

import pytest
import torch

from quantkit import products
from quantkit.products import accumulate_, accumulate_gram_, fast_linears, mirror_, product


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
def test_a_sum_of_products_is_that_of_float64(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(products, "PRODUCT_AT_ONCE", at_once)
    total, left, right = random(5, 7), random(33, 5, seed=1), random(33, 7, seed=2)
    expected = total.double() + left.double().T @ right.double()
    torch.testing.assert_close(accumulate_(total, left, right).double(), expected, rtol=1e-5, atol=1e-5)


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
