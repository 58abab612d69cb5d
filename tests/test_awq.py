# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale search against its loss computed the slow way: by running the linears on the inputs themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.grids.registry import dequantize
from quantkit.methods import awq
from quantkit.methods.awq import candidate_scales, relative_magnitude, search_scale, site_errors
from quantkit.methods.site import QUANTIZE, SiteInput
from quantkit.methods.table import Options
from quantkit.scheme import QuantizedTensor, Scheme
from quantkit.stats import SiteStats, collect
from tests.integer_parameters import encode, plain_grid

COLUMNS = 64


def inputs(tokens: int = 300, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Inputs with a few channels far larger than the others, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    return x * torch.exp(1.2 * torch.randn(columns, generator=generator))


def linears(columns: int = COLUMNS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(rows, columns, generator=generator) for rows in (24, 8, 8)]


def stats_of(x: Tensor) -> SiteStats:
    return collect([x], x.shape[1], torch.device("cpu"))


def round_to_nearest(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> Tensor:
    scales, zeros = plain_grid(weight, scheme, min_zero)
    return dequantize(QuantizedTensor(encode(weight, scales, zeros, scheme), scales, zeros, scheme))


def loss_by_running(weights: list[Tensor], schemes: list[Scheme], x: Tensor, scale: Tensor, min_zero: int = 0) -> float:
    """sum ||X W^T - (X / s) Q(W s)^T||^2, in float64."""
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        rounded = round_to_nearest(weight * scale, scheme, min_zero)
        difference = x.double() @ weight.double().T - (x.double() / scale.double()) @ rounded.double().T
        total += float(difference.square().sum())
    return total


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([16, 32, -1]),
    min_zero=st.integers(0, 1),
    spread=st.floats(0, 1.5),
    seed=st.integers(0, 2**16),
)
def test_the_error_from_the_gram_matrix_is_that_of_running_the_linears(
    bits: int, symmetric: bool, group: int, min_zero: int, spread: float, seed: int
) -> None:
    x, weights, schemes = inputs(seed=seed), linears(seed=seed + 1), [Scheme(bits, group, symmetric)] * 3
    scale = torch.exp(spread * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(seed + 2)))
    expected = loss_by_running(weights, schemes, x, scale, min_zero)
    assert float(site_errors(weights, schemes, stats_of(x).gram, scale[None], min_zero)) == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize("scheme", [Scheme(b, 32, s) for b in (2, 3, 4) for s in (True, False)], ids=str)
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_scale_chosen_is_the_best_of_the_candidates(scheme: Scheme, seed: int) -> None:
    x, weights, schemes = inputs(seed=seed), linears(seed=seed + 1), [scheme] * 3
    stats = stats_of(x)
    found = search_scale(weights, schemes, stats.gram, stats.abs_mean, torch.arange(COLUMNS))
    candidates = candidate_scales(x.abs().mean(0), relative_magnitude(weights, schemes))
    losses = {name: loss_by_running(weights, schemes, x, scale) for name, scale in candidates.items()}
    assert losses[found.kind] <= min(losses.values()) * 1.001
    assert found.error == pytest.approx(losses[found.kind], rel=1e-3)
    assert found.unscaled_error == pytest.approx(losses["1"], rel=1e-3)
    assert found.error <= found.unscaled_error
    torch.testing.assert_close(found.scale, candidates[found.kind])


def test_large_channels_are_worth_scaling() -> None:
    x, weights, schemes = inputs(), linears(), [Scheme(3, 32, False)] * 3
    stats = stats_of(x)
    found = search_scale(weights, schemes, stats.gram, stats.abs_mean, torch.arange(COLUMNS))
    assert found.error < 0.8 * found.unscaled_error
    largest, smallest = stats.abs_mean.topk(8).indices, (-stats.abs_mean).topk(8).indices
    assert float(found.scale[largest].mean()) > 2 * float(found.scale[smallest].mean())


def test_no_scale_is_chosen_where_none_helps() -> None:
    """One column holds all the input: making the others coarser is free, and s = 1 stays when nothing is gained."""
    weights, scheme = [torch.full((4, 32), 0.5)], Scheme(4, 32, True)  # exactly on the grid
    x = inputs(columns=32)
    stats = stats_of(x)
    found = search_scale(weights, [scheme], stats.gram, stats.abs_mean, torch.arange(32))
    assert found.kind == "1"
    assert bool((found.scale == 1).all())


def test_candidates_contain_one_and_both_forms_each_centred_and_bounded() -> None:
    abs_mean = torch.tensor([1e-6, 0.5, 1.0, 300.0])
    candidates = candidate_scales(abs_mean, torch.tensor([0.3, 0.5, 0.2, 0.4]))
    assert next(iter(candidates)) == "1"
    assert bool((candidates["1"] == 1).all())
    assert len(candidates) == 1 + len(awq.POWERS) + len(awq.RATIO_POWERS)
    for name, scale in candidates.items():
        assert bool(torch.isfinite(scale).all())
        assert 2.0**-10 <= float(scale.min()) <= float(scale.max()) <= 2.0**10
        assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-4), name
        if name.startswith("x") and "/w" not in name:
            assert bool((scale[1:] >= scale[:-1]).all())


@pytest.mark.parametrize("abs_mean", [torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1e-20]), torch.full((4,), 1e20)])
@pytest.mark.parametrize("weight_mean", [torch.zeros(4), torch.tensor([0.0, 1.0, 0.5, 1e-9])])
def test_candidates_of_channels_that_are_silent_or_deafening_are_finite(abs_mean: Tensor, weight_mean: Tensor) -> None:
    for scale in candidate_scales(abs_mean, weight_mean).values():
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())


def test_the_weights_share_of_their_group_s_range() -> None:
    weights = [torch.tensor([[1.0, -2.0, 8.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0]])]
    found = relative_magnitude(weights, [Scheme(4, 2, True), Scheme(4, 4, True)])
    rows = torch.tensor([[0.5, 1.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0], [1.0, 1 / 3, 0.0, 0.0]])
    torch.testing.assert_close(found, rows.mean(0))


@pytest.mark.parametrize("heads", [1, 2])
def test_columns_of_query_heads_that_share_a_value_head_share_its_scale(heads: int) -> None:
    head_dim, repeats = 16 // heads, 4
    channel = torch.arange(16).view(heads, 1, head_dim).expand(heads, repeats, head_dim).reshape(-1)
    x, weights, schemes = inputs(), linears()[:1], [Scheme(3, 32, False)]
    stats = stats_of(x)
    found = search_scale(weights, schemes, stats.gram, stats.abs_mean, channel)
    assert found.scale.shape == (16,)
    assert found.error == pytest.approx(loss_by_running(weights, schemes, x, found.scale[channel]), rel=1e-3)
    shared = torch.stack([x.abs().mean(0)[channel == c].mean() for c in range(16)])
    magnitude = torch.stack([relative_magnitude(weights, schemes)[channel == c].mean() for c in range(16)])
    candidates = candidate_scales(shared, magnitude)
    losses = {name: loss_by_running(weights, schemes, x, scale[channel]) for name, scale in candidates.items()}
    assert losses[found.kind] <= min(losses.values()) * 1.001


# ---------------------------------------------------------------- the methods


def site_input(channel: Tensor | None, schemes: list[Scheme | None]) -> SiteInput:
    names = ("q", "k", "v")
    weights = dict(zip(names, linears(), strict=True))
    return SiteInput(weights, dict(zip(names, schemes, strict=True)), stats_of(inputs()), channel)


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_awq_returns_the_scale_that_its_codes_need(rounding: str) -> None:
    scheme = Scheme(4, 32, False)
    site = site_input(torch.arange(COLUMNS), [scheme] * 3)
    result = QUANTIZE["awq"](site, Options(rounding=rounding))
    assert result.scale is not None
    assert set(result.quantized) == {"q", "k", "v"}
    x = inputs().double()
    for name, quantized in result.quantized.items():
        exact = x @ site.weights[name].double().T
        found = (x / result.scale.double()) @ dequantize(quantized).double().T
        share = float((found - exact).square().sum() / exact.square().sum())
        assert result.records[name]["loss"] == pytest.approx(share, rel=1e-2)
        assert 0 <= result.records[name]["scale_gain"] < 1


def test_awq_loses_less_than_rounding_and_gptq_after_it_less_again() -> None:
    def loss(method: str, rounding: str) -> float:
        site = site_input(torch.arange(COLUMNS), [Scheme(3, 32, False)] * 3)
        records = QUANTIZE[method](site, Options(rounding=rounding)).records
        return float(sum(record["loss"] for record in records.values()))

    assert loss("awq", "gptq") < loss("awq", "nearest") < loss("rtn", "nearest")


def test_awq_where_nothing_absorbs_a_scale_is_gptq() -> None:
    site = site_input(None, [Scheme(4, 32, False)] * 3)
    awq_result, gptq_result = QUANTIZE["awq"](site, Options()), QUANTIZE["gptq"](site, Options())
    assert awq_result.scale is None
    for name, quantized in awq_result.quantized.items():
        assert torch.equal(quantized.codes, gptq_result.quantized[name].codes)


@pytest.mark.parametrize("method", QUANTIZE)
def test_linears_that_stay_in_16_bit_are_left_out(method: str) -> None:
    scheme = Scheme(4, 32, False)
    result = QUANTIZE[method](site_input(torch.arange(COLUMNS), [scheme, None, scheme]), Options(rounding="nearest"))
    assert set(result.quantized) == set(result.records) == {"q", "v"}
    nothing = QUANTIZE[method](site_input(torch.arange(COLUMNS), [None] * 3), Options())
    assert not nothing.quantized
    assert nothing.scale is None


def test_linears_of_a_site_may_have_schemes_of_their_own() -> None:
    schemes: list[Scheme | None] = [Scheme(4, 32, False), Scheme(8, 64, True), Scheme(2, 16, False)]
    for method in QUANTIZE:
        result = QUANTIZE[method](site_input(torch.arange(COLUMNS), schemes), Options())
        assert [q.scheme for q in result.quantized.values()] == schemes
        losses = [result.records[name]["loss"] for name in ("k", "q", "v")]
        assert losses == sorted(losses)


@pytest.mark.parametrize("method", QUANTIZE)
def test_methods_are_deterministic_and_leave_the_weights_alone(method: str) -> None:
    """The statistics are theirs to use up: AWQ rescales the Gram matrix in place, which has no second copy to spare."""
    first_site, second_site = (site_input(torch.arange(COLUMNS), [Scheme(4, 32, False)] * 3) for _ in range(2))
    first, second = QUANTIZE[method](first_site, Options()), QUANTIZE[method](second_site, Options())
    for name, weight in zip(("q", "k", "v"), linears(), strict=True):
        assert torch.equal(first.quantized[name].codes, second.quantized[name].codes)
        assert torch.equal(first.quantized[name].scales, second.quantized[name].scales)
        assert torch.equal(first_site.weights[name], weight)


def test_rtn_needs_no_statistics() -> None:
    weights = dict(zip("qkv", linears(), strict=True))
    result = QUANTIZE["rtn"](SiteInput(weights, dict.fromkeys("qkv", Scheme(4, 32, True)), None, None), Options())
    for name, quantized in result.quantized.items():
        assert torch.equal(dequantize(quantized), round_to_nearest(weights[name], Scheme(4, 32, True)))
        error = (dequantize(quantized) - weights[name]).square().sum() / weights[name].square().sum()
        assert result.records[name]["loss"] == pytest.approx(float(error), rel=1e-5)


def test_damping_that_had_to_rise_is_recorded() -> None:
    site = site_input(None, [Scheme(4, 32, True)] * 3)
    assert site.stats is not None
    site.stats.gram = torch.ones(COLUMNS, COLUMNS) - 1e-3 * (1 - torch.eye(COLUMNS)) * 2
    site.stats.gram -= 1e-2 * torch.eye(COLUMNS)
    records = QUANTIZE["gptq"](site, Options(damp=0.0)).records
    assert all(record["damp_raised_to"] >= 1e-4 for record in records.values())
