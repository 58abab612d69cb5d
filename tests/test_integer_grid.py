# SPDX-License-Identifier: Apache-2.0
"""The choice of scales and zero points, against an exhaustive search and at the edges of float16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import NumericsError, SchemeError
from quantkit.grids import integer
from quantkit.grids.base import SMALLEST_SCALE, to_float16
from quantkit.grids.registry import dequantize
from quantkit.methods import rtn
from quantkit.scheme import QuantizedTensor, Scheme
from tests.integer_parameters import encode, plain_grid, search_grid

SCHEMES = [Scheme(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    return dequantize(QuantizedTensor(encode(weight, scales, zeros, scheme), scales, zeros, scheme))


def group_errors(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, energy: Tensor) -> Tensor:
    """The weighted squared error of every group, float64 [out, groups]."""
    difference = (rounded(weight, scales, zeros, scheme) - weight).double()
    errors: Tensor = (difference.square() * energy.double()).unflatten(1, (scales.shape[1], -1)).sum(2)
    return errors


def exhaustive(weight: Tensor, scheme: Scheme, energy: Tensor, min_zero: int) -> Tensor:
    """The least error of every group over 300 scales (of both signs if symmetric) times all zero points."""
    groups = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
    importance = energy.view(1, groups.shape[1], -1)
    reach = groups.abs().amax(2) * 3 / scheme.max_code
    best = torch.full_like(reach, float("inf"))
    for zero in [scheme.middle] if scheme.symmetric else range(min_zero, scheme.max_code + 1):
        for sign in (1, -1) if scheme.symmetric else (1,):
            for step in range(1, 301):
                scale = (sign * reach * step / 300).half().float().unsqueeze(2)
                codes = (torch.round(groups / scale) + zero).clamp(0, scheme.max_code)
                best = torch.minimum(best, (((codes - zero) * scale - groups).square() * importance).sum(2))
    return best.double()


@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.bits <= 4], ids=str)
def test_the_search_finds_nearly_what_an_exhaustive_one_finds(scheme: Scheme, min_zero: int) -> None:
    weight = normal(16, 64)
    energy = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 3 + 0.01
    found = group_errors(weight, *search_grid(weight, scheme, energy, min_zero), scheme, energy).sum()
    assert found < 1.06 * exhaustive(weight, scheme, energy, min_zero).sum()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    columns=st.integers(1, 40),
    groups=st.integers(1, 3),
    min_zero=st.integers(0, 1),
    magnitude=st.integers(-12, 12),
    shift=st.floats(-4, 4),
    seed=st.integers(0, 2**16),
)
def test_the_search_is_never_worse_than_the_plain_grid(
    bits: int, symmetric: bool, columns: int, groups: int, min_zero: int, magnitude: int, shift: float, seed: int
) -> None:
    scheme = Scheme(bits, columns, symmetric)
    weight = (normal(5, columns * groups, seed) + shift) * 2.0**magnitude
    # The search adds a little of the mean to every energy: with that included it is exactly what it minimises.
    energy = normal(1, columns * groups, seed + 1)[0].square()
    energy = energy / energy.mean() + 1e-4
    plain, searched = plain_grid(weight, scheme, min_zero), search_grid(weight, scheme, energy, min_zero)
    before = group_errors(weight, *plain, scheme, energy + 1e-4)
    after = group_errors(weight, *searched, scheme, energy + 1e-4)
    assert bool((after <= before * (1 + 1e-4) + 1e-12 * 4.0**magnitude).all())
    for scales, zeros in (plain, searched):
        assert (scales.dtype, zeros.dtype) == (torch.float16, torch.uint8)
        assert scales.shape == zeros.shape == (5, groups)
        assert bool((scales != 0).all())
        if symmetric:
            assert bool((zeros == scheme.middle).all())
        else:
            assert int(zeros.min()) >= min_zero
            assert int(zeros.max()) <= scheme.max_code
            assert bool((scales > 0).all())
        assert int(encode(weight, scales, zeros, scheme).max()) <= scheme.max_code


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_plain_grid_spans_its_group(scheme: Scheme, min_zero: int, shift: float) -> None:
    """No weight is further than half a step from its value: nothing is clipped, wherever the zero point may be."""
    weight = normal(8, 64) + shift
    scales, zeros = plain_grid(weight, scheme, min_zero)
    error = (rounded(weight, scales, zeros, scheme) - weight).abs().unflatten(1, (2, 32)).amax(2)
    # half a step, and the rounding of the scale to float16
    step = scales.float().abs() * 0.501 + weight.abs().max() * 2.0**-11
    assert bool((error <= step).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("search", [True, False])
def test_the_sign_of_a_symmetric_scale_gives_the_longer_half_to_the_larger_weight(bits: int, search: bool) -> None:
    scheme = Scheme(bits, 8, True)
    weight = 0.01 * normal(1, 16)
    weight[0, 3], weight[0, 11] = 4.0, -4.0
    scales, zeros = search_grid(weight, scheme) if search else plain_grid(weight, scheme)
    assert scales[0, 0] < 0 < scales[0, 1]
    codes = encode(weight, scales, zeros, scheme)
    assert codes[0, 3] == codes[0, 11] == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5, 2.0**-24, 1e-30, -1e-30, 3e4, -3e4])
def test_constant_groups(scheme: Scheme, search: bool, value: float) -> None:
    weight = torch.full((2, 32), value)
    quantized = rtn.quantize(weight, scheme, energy=torch.ones(32), search=search)
    found = dequantize(quantized)
    assert bool(torch.isfinite(found).all())
    # a float16 scale is exact to 2**-11, above the smallest ones
    assert float((found - value).abs().max()) <= 2.0**-10 * abs(value) + 2 * SMALLEST_SCALE
    if value == 0.0:
        assert bool((found == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_beside_others_stays_zero(scheme: Scheme) -> None:
    weight = normal(4, 96)
    weight[:, 32:64] = 0
    assert bool((dequantize(rtn.quantize(weight, scheme, energy=torch.zeros(96)))[:, 32:64] == 0).all())


def test_dead_columns_do_not_rule_the_grid_of_the_others() -> None:
    scheme, rows = Scheme(4, 32, True), Scheme(4, -1, True)
    weight, energy = normal(8, 32), torch.ones(32)
    weight[:, 0], energy[0] = 6.0, 0.0
    error = group_errors(weight, *search_grid(weight, scheme, energy), scheme, energy).sum()
    alone = group_errors(
        weight[:, 1:], *search_grid(weight[:, 1:], rows := Scheme(4, -1, True)), rows, energy[1:]
    ).sum()
    plain = group_errors(weight, *plain_grid(weight, scheme), scheme, energy).sum()
    assert error < 1.25 * alone < 0.5 * plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_energy_moves_the_error_to_the_columns_that_matter_less(scheme: Scheme) -> None:
    weight = normal(32, 32)
    energy = torch.ones(32)
    energy[5] = 1000.0
    weighted = dequantize(rtn.quantize(weight, scheme, energy=energy))
    alike = dequantize(rtn.quantize(weight, scheme))
    assert (weighted - weight)[:, 5].square().sum() < 0.6 * (alike - weight)[:, 5].square().sum()


def test_scaling_weights_by_a_power_of_two_scales_the_grid_alone() -> None:
    for scheme in SCHEMES:
        weight = normal(4, 64)
        scales, zeros = search_grid(weight, scheme)
        scaled, same = search_grid(weight * 16, scheme)
        assert torch.equal(scaled, scales * 16)
        assert torch.equal(zeros, same)


def test_energy_counts_by_its_ratios() -> None:
    weight, energy = normal(4, 64), torch.rand(64, generator=torch.Generator().manual_seed(3))
    for scheme in SCHEMES:
        first, second = search_grid(weight, scheme, energy), search_grid(weight, scheme, energy * 2.0**20)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("rows_at_once", [1, 64, 200, 10_000])
@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_the_result_does_not_depend_on_how_many_rows_are_searched_at_once(
    scheme: Scheme, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, energy = normal(37, 64), torch.rand(64, generator=torch.Generator().manual_seed(2))
    expected = search_grid(weight, scheme, energy)
    monkeypatch.setattr(integer, "ROWS_AT_ONCE", rows_at_once)
    found = search_grid(weight, scheme, energy)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("value", [3e6, -3e6, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("scheme", SCHEMES[:6], ids=str)
def test_scales_beyond_float16_are_refused(scheme: Scheme, value: float) -> None:
    weight = normal(4, 32)
    weight[2, 7] = value
    for choose in (plain_grid, search_grid):
        with pytest.raises(NumericsError, match="beyond float16"):
            choose(weight, scheme)


def test_scales_are_stored_with_their_sign_and_never_as_zero() -> None:
    scales = torch.tensor([0.0, 1e-12, -1e-12, 65504.0, -65504.0, 1.0])
    assert to_float16(scales).tolist() == [2.0**-24, 2.0**-24, -(2.0**-24), 65504.0, -65504.0, 1.0]
    for bad in (65600.0, -65600.0, float("nan"), float("inf")):
        with pytest.raises(NumericsError):
            to_float16(torch.tensor([1.0, bad]))


def test_a_group_size_that_does_not_divide_the_columns_is_refused() -> None:
    for choose in (plain_grid, search_grid):
        with pytest.raises(SchemeError, match="48 is not divisible by group_size 32"):
            choose(normal(2, 48), Scheme(4, 32, True))


def test_whole_rows_are_one_group() -> None:
    weight = normal(3, 40)
    scales, zeros = search_grid(weight, Scheme(4, -1, False))
    assert scales.shape == zeros.shape == (3, 1)
    assert torch.equal(scales, search_grid(weight, Scheme(4, 40, False))[0])
