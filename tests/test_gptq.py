# SPDX-License-Identifier: Apache-2.0
"""The blocked GPTQ solver against the paper's loop, one column at a time with a full inverse in float64."""

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.grids.base import Parameters
from quantkit.grids.registry import dequantize
from quantkit.methods import columns, gptq, rtn
from quantkit.methods.gptq import Factor, factorize
from quantkit.scheme import QuantizedTensor, Scheme, expand
from quantkit.stats import output_error
from tests.integer_parameters import lattice, search_grid


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] with a few strong directions and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) + 2 * torch.randn(
        tokens, 4, generator=generator
    ) @ torch.randn(4, columns, generator=generator)
    return mixed * torch.exp(torch.randn(columns, generator=generator))


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: Tensor) -> Tensor:
    return (inputs.double().T @ inputs.double()).float()


def oracle(
    weight: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, damp: float, act_order: bool
) -> Tensor:
    """GPTQ as the paper states it, before its section on Cholesky: codes [out, in].

    Each column is rounded, the others make up for it through a row of the inverse of the matrix of those not yet
    rounded, and then the column leaves that inverse by one step of Gaussian elimination.
    """
    columns = weight.shape[1]
    matrix, work = gram.double().clone(), weight.double().clone()
    mean = matrix.diagonal().mean()
    dead = matrix.diagonal() <= 0
    matrix[dead, dead] = mean
    work[:, dead] = 0
    matrix += damp * mean * torch.eye(columns, dtype=torch.float64)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    inverse = torch.linalg.inv(matrix)
    scale = expand(scales.double(), columns // scales.shape[1])
    zero = expand(zeros.double(), columns // scales.shape[1])
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    left = torch.ones(columns, dtype=torch.bool)
    for j in order.tolist():
        code = (torch.round(work[:, j] / scale[:, j]) + zero[:, j]).clamp(0, scheme.max_code)
        codes[:, j] = code.to(torch.uint8)
        error = (work[:, j] - (code - zero[:, j]) * scale[:, j]) / inverse[j, j]
        work[:, left] -= error.unsqueeze(1) * inverse[j, left]
        left[j] = False
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def by_gptq(
    weight: Tensor, gram: Tensor, scheme: Scheme, damp: float = 0.01, act_order: bool = True
) -> QuantizedTensor:
    factor = factorize(gram, damp=damp, act_order=act_order)
    return gptq.quantize(weight, scheme, factor, energy=gram.diagonal())


def loss(weight: Tensor, quantized: QuantizedTensor, gram: Tensor) -> float:
    return float(output_error(dequantize(quantized).double() - weight.double(), gram).sum())


SHAPES = [(1, 32, 32), (7, 96, 32), (16, 160, 32), (3, 272, 16), (8, 200, -1), (5, 129, 43)]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_paper_s_loop(
    shape: tuple[int, int, int], bits: int, symmetric: bool, act_order: bool
) -> None:
    rows, columns, group = shape
    scheme = Scheme(bits, group, symmetric)
    weight, gram = weights(rows, columns), gram_of(correlated(4 * columns, columns))
    found = by_gptq(weight, gram, scheme, act_order=act_order)
    expected = oracle(weight, gram, found.scales, found.zeros, scheme, 0.01, act_order)
    differ = (found.codes != expected).double().mean()  # a tie that float32 sees otherwise moves the columns after it
    assert float(differ) <= 0.01
    reference = QuantizedTensor(expected, found.scales, found.zeros, scheme)
    assert loss(weight, found, gram) == pytest.approx(loss(weight, reference, gram), rel=0.01)


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_become_zero_and_take_no_range(act_order: bool) -> None:
    inputs, weight, scheme = correlated(400, 96), weights(6, 96), Scheme(4, 32, False)
    dead = [0, 31, 40, 95]
    inputs[:, dead] = 0
    weight[:, 40] = 9.0
    gram = gram_of(inputs)
    factor = factorize(gram, act_order=act_order)
    assert factor.dead.nonzero().flatten().tolist() == dead
    found = gptq.quantize(weight, scheme, factor, energy=gram.diagonal())
    assert bool((dequantize(found)[:, dead] == 0).all())
    assert float(found.scales.max()) < 0.1
    assert torch.equal(found.codes, oracle(weight, gram, found.scales, found.zeros, scheme, 0.01, act_order))


def test_a_layer_that_never_saw_an_input_becomes_zero() -> None:
    found = by_gptq(weights(4, 64), torch.zeros(64, 64), Scheme(4, 32, True))
    assert bool((dequantize(found) == 0).all())


@pytest.mark.parametrize("damp", [0.01, 0.1])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_fewer_tokens_than_columns_are_handled_by_damping(tokens: int, damp: float) -> None:
    weight, gram, scheme = weights(5, 96), gram_of(correlated(tokens, 96)), Scheme(4, 32, True)
    factor = factorize(gram, damp=damp)
    assert factor.damp >= damp
    found = gptq.quantize(weight, scheme, factor, energy=gram.diagonal())
    assert loss(weight, found, gram) < loss(weight, rtn.quantize(weight, scheme, search=False), gram)


def test_damping_rises_when_the_factorisation_fails() -> None:
    gram = gram_of(correlated(3, 64))
    gram -= 1e-3 * gram.diagonal().mean() * torch.eye(64)  # what rounding may do to a singular matrix, and more
    gram.diagonal().clamp_(min=1e-6)
    factor = factorize(gram, damp=0.0)
    assert 1e-4 <= factor.damp <= 0.1
    assert bool(torch.isfinite(factor.feedback).all())
    found = gptq.quantize(weights(4, 64), Scheme(4, 32, True), factor, energy=gram.diagonal())
    expected = oracle(weights(4, 64), gram, found.scales, found.zeros, found.scheme, factor.damp, True)
    assert float((found.codes != expected).double().mean()) <= 0.02


def test_the_damping_asked_for_is_used_when_it_is_enough() -> None:
    gram = gram_of(correlated(300, 64))
    assert factorize(gram, damp=0.05).damp == 0.05
    assert factorize(gram, damp=0.0).damp == 0.0


def test_a_matrix_that_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be factorised, even with damping"):
        factorize(torch.full((8, 8), -100.0).fill_diagonal_(1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(3, 3), (1, 5)])
def test_a_gram_matrix_that_is_not_finite_is_refused(value: float, place: tuple[int, int]) -> None:
    gram = gram_of(correlated(100, 16))
    gram[place] = gram[place[::-1]] = value
    with pytest.raises(NumericsError, match="Gram matrix"):
        factorize(gram)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_feedback_makes_the_gram_matrix_diagonal(act_order: bool) -> None:
    gram = gram_of(correlated(500, 80))
    factor = factorize(gram, damp=0.01, act_order=act_order)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(80)
    damped = damped[factor.order][:, factor.order]
    upper = factor.feedback.double().T
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() == 1).all())
    inverse = torch.linalg.inv(upper)
    diagonal = inverse @ damped @ inverse.T
    scale = float(damped.diagonal().max())
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), rtol=0, atol=1e-5 * scale)
    if act_order:
        diagonal = gram.diagonal()[factor.order]
        assert bool((diagonal[1:] <= diagonal[:-1]).all())
    else:
        assert factor.order.tolist() == list(range(80))


@pytest.mark.parametrize("scheme", [Scheme(b, 32, s) for b in (2, 3, 4, 8) for s in (True, False)], ids=str)
def test_correlated_inputs_lose_less_than_by_rounding_to_nearest(scheme: Scheme) -> None:
    weight, gram = weights(24, 128), gram_of(correlated(600, 128))
    nearest = loss(weight, rtn.quantize(weight, scheme, energy=gram.diagonal()), gram)
    assert loss(weight, by_gptq(weight, gram, scheme), gram) < 0.75 * nearest
    assert loss(weight, by_gptq(weight, gram, scheme, act_order=False), gram) < nearest


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for() -> None:
    weight, scheme = weights(8, 64), Scheme(4, 32, False)
    gram = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1)
    nearest = rtn.quantize(weight, scheme, energy=gram.diagonal())
    assert torch.equal(by_gptq(weight, gram, scheme).codes, nearest.codes)


def test_groups_stay_consecutive_under_act_order() -> None:
    weight, gram, scheme = weights(6, 96), gram_of(correlated(400, 96)), Scheme(4, 32, False)
    found = by_gptq(weight, gram, scheme)
    scales, zeros = search_grid(weight, scheme, gram.diagonal())
    assert found.g_idx is None
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.zeros, zeros)


def test_a_grid_that_is_given_is_used() -> None:
    weight, gram, scheme = weights(6, 64), gram_of(correlated(400, 64)), Scheme(4, 32, True)
    grid = (torch.full((6, 2), 0.02).half(), torch.full((6, 2), 8, dtype=torch.uint8))
    found = gptq.quantize(weight, scheme, factorize(gram), energy=gram.diagonal(), parameters=Parameters(scheme, *grid))
    assert torch.equal(found.scales, grid[0])
    assert torch.equal(found.codes, oracle(weight, gram, *grid, scheme, 0.01, True))


@pytest.mark.parametrize("wide", [1, 48, 1000])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_width_of_blocks_changes_only_how_sums_are_split(
    block: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram, scheme = weights(6, 160), gram_of(correlated(700, 160)), Scheme(4, 32, False)
    expected = by_gptq(weight, gram, scheme)
    monkeypatch.setattr(columns, "BLOCK", block)
    monkeypatch.setattr(columns, "WIDE", {"cpu": wide})
    assert float((by_gptq(weight, gram, scheme).codes != expected.codes).double().mean()) <= 0.01


def test_the_same_inputs_give_the_same_codes_and_are_left_alone() -> None:
    weight, gram, scheme = weights(6, 160), gram_of(correlated(100, 160)), Scheme(3, 32, False)
    copies = weight.clone(), gram.clone()
    first, second = by_gptq(weight, gram, scheme), by_gptq(weight, gram, scheme)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


def test_rows_do_not_depend_on_each_other() -> None:
    weight, gram, scheme = weights(6, 96), gram_of(correlated(400, 96)), Scheme(4, 32, False)
    factor: Factor = factorize(gram)
    whole = gptq.quantize(weight, scheme, factor, energy=gram.diagonal())
    alone = gptq.quantize(weight[2:3], scheme, factor, energy=gram.diagonal())
    assert torch.equal(whole.codes[2:3], alone.codes)


# ---------------------------------------------------------------- drifted inputs


def test_the_corrected_weight_is_the_ridge_regression_on_the_original_outputs() -> None:
    x0 = correlated(600, 24)
    x = x0 + 0.2 * correlated(600, 24, seed=5)
    weight, gram = weights(6, 24), gram_of(x)
    factor = factorize(gram, damp=0.01)
    found = weight + gptq.times_inverse(weight @ ((x0 - x).T @ x), factor)
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(24)
    expected = torch.linalg.solve((gram + ridge).double(), (x.T @ x0 @ weight.T + ridge @ weight.T).double()).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    errors = [(x @ w.T - x0 @ weight.T).square().sum() for w in (weight, found)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_rows_are_rounded_alike_in_any_share_of_them(parts: int) -> None:
    """Each rank takes some: what is compared is what was rounded, as a code hides a difference in the last bit."""
    rows, width, max_code = 500, 128, 15
    feedback = torch.tril(0.1 * torch.randn(width, width, generator=torch.Generator().manual_seed(2)))
    scales, zeros, group = (
        torch.full((1, rows), 0.01),
        torch.full((1, rows), 8.0),
        torch.zeros(width, dtype=torch.int64),
    )

    def rounded(share: slice) -> list[Tensor]:
        target = weights(rows, width).T.contiguous()[:, share].contiguous()
        part = target.clone()
        steps, errors = columns.round_run(
            target,
            part,
            lattice(scales[:, share].contiguous(), zeros[:, share].contiguous(), max_code),
            group,
            feedback,
        )
        return [target, steps, errors]

    shares = [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
    together = [torch.cat(found, 1) for found in zip(*(rounded(share) for share in shares), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, rounded(slice(None)), strict=True))
