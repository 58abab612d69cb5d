# SPDX-License-Identifier: Apache-2.0
"""What calibration sums up, against float64, and what it must stop at."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import NumericsError
from quantkit.hardware.matmul import fast_bfloat16
from quantkit.stats import (
    Projection,
    SiteStats,
    collect,
    empty_stats,
    output_error,
    require_finite_stats,
    rescale_,
    shrink_,
)

CPU = torch.device("cpu")


def collected(*batches: torch.Tensor) -> SiteStats:
    return collect(batches, batches[0].shape[-1], CPU)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4),
    columns=st.integers(1, 24),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_sums_are_those_of_float64(sizes: list[tuple[int, int]], columns: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(*size, columns, generator=generator).to(dtype) for size in sizes]
    stats = collected(*batches)
    x = torch.cat([batch.reshape(-1, columns) for batch in batches]).double()
    assert stats.tokens == len(x)
    assert (stats.gram.dtype, stats.abs_sum.dtype, stats.abs_max.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.abs_sum.double(), x.abs().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.abs_mean.double(), x.abs().mean(0), rtol=1e-5, atol=1e-5)
    assert float(stats.abs_max) == float(x.abs().max())


def test_the_inputs_are_left_alone() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    copy = x.clone()
    collected(x)
    assert torch.equal(x, copy)


def test_nothing_added_is_zero() -> None:
    stats = collect([], 4, CPU)
    assert bool((stats.abs_mean == 0).all())
    require_finite_stats(stats, "site")


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 16), seed=st.integers(0, 2**16))
def test_the_output_error_is_that_of_running_the_linear(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, columns, generator=generator)
    weight, rounded = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    expected = (x.double() @ (weight - rounded).double().T).square().sum(0)
    found = output_error(weight - rounded, collected(x).gram)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_rescale_makes_the_gram_matrix_of_the_divided_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(50, 12, generator=generator), torch.rand(12, generator=generator) + 0.1
    torch.testing.assert_close(rescale_(collected(x).gram, scale), collected(x / scale).gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("later", [True, False])
def test_inputs_that_are_not_finite_stop_with_the_name_of_the_site(value: float, later: bool) -> None:
    good, bad = torch.ones(4, 8), torch.ones(4, 8)
    bad[2, 3] = value
    stats = collected(bad, good) if later else collected(good, bad)
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.mlp\.up_proj: its calibration inputs are not finite"):
        require_finite_stats(stats, "model.layers.3.mlp.up_proj")


def test_an_overflow_of_the_sums_stops_with_the_name_of_the_site() -> None:
    stats = collected(torch.full((4, 8), 1e19))
    assert bool(torch.isfinite(stats.abs_max))
    with pytest.raises(NumericsError, match=r"a\.site: its Gram matrix overflowed float32 \(largest input 1e\+19\)"):
        require_finite_stats(stats, "a.site")


def test_the_drift_is_that_of_the_inputs_from_the_originals() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, originals = (torch.randn(2, 3, 7, 5, generator=generator).to(torch.bfloat16) for _ in range(2))
    stats = collect(inputs, 5, CPU, originals)
    x, x0 = inputs.reshape(-1, 5).double(), originals.reshape(-1, 5).double()
    assert stats.drift is not None
    torch.testing.assert_close(stats.drift.double(), (x0 - x).T @ x, rtol=1e-2, atol=0.1)  # differences in 16 bit


def test_the_drift_times_a_weight_can_be_had_from_what_the_original_returns() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(64, 96, 12, generator=generator), torch.randn(5, 12, generator=generator)
    x0 = x + 0.03 * torch.randn(x.shape, generator=generator)
    expected = torch.einsum("oi,sti,stj->oj", weight.double(), (x0 - x).double(), x.double())
    by_inputs = collect(x.split(16), 12, CPU, x0.split(16), projection=Projection(weight))
    by_outputs = collect(x.split(16), 12, CPU, (x0 @ weight.T).split(16), projection=Projection(weight, applied=True))
    scale = float(expected.abs().max())
    rounded = 2**-7 if fast_bfloat16() else 1e-3  # what a CPU multiplies in bfloat16
    for stats in (by_inputs, by_outputs):
        assert stats.projected
        assert stats.drift is not None
        torch.testing.assert_close(stats.drift.double(), expected, rtol=rounded, atol=rounded * scale)


@pytest.mark.parametrize("how", ["inputs", "weight", "multiplied"])
@pytest.mark.parametrize("followed", [1, 8, 11, 24])
def test_the_drift_of_the_first_samples_stands_for_all(how: str, followed: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(24, 16, 12, generator=generator), torch.randn(5, 12, generator=generator)
    x0 = x + 0.1 * torch.randn(x.shape, generator=generator)
    originals = x0[:followed] @ weight.T if how == "multiplied" else x0[:followed]
    by = None if how == "inputs" else Projection(weight, applied=how == "multiplied")
    stats = collect(x.split(8), 12, CPU, originals.split(8), projection=by)
    expected = torch.einsum("sti,stj->ij", (x0 - x)[:followed].double(), x[:followed].double()) * 24 / followed
    expected = expected if how == "inputs" else weight.double() @ expected
    assert stats.drift is not None
    assert float((stats.drift - expected).norm()) < 1e-2 * float(expected.norm())
    gram = torch.einsum("sti,stj->ij", x.double(), x.double())
    torch.testing.assert_close(stats.gram.double(), gram, rtol=1e-5, atol=1e-3)
    assert stats.tokens == 24 * 16


@pytest.mark.parametrize(("tokens", "width", "share"), [(64, 8, 0.5), (8, 64, 32.0), (65_535, 8, 4 * 8 / 65_535)])
def test_the_gram_matrix_of_few_tokens_is_shrunk(tokens: int, width: int, share: float) -> None:
    stats = collected(torch.randn(tokens, width))
    gram, mean = stats.gram.clone(), stats.gram.diagonal().mean()
    shrunk = shrink_(stats)
    assert torch.allclose(shrunk.gram - gram, share * mean * torch.eye(width), rtol=1e-3, atol=1e-3 * float(mean))


def test_that_of_a_usual_run_is_taken_as_it_is() -> None:
    """128 windows of 512 tokens, for linears of up to 8,192 inputs: no byte may change."""
    for width in (8, 8192):
        gram = torch.ones(width, 1).expand(width, width)
        stats = replace(empty_stats(1, CPU), gram=gram, tokens=65_536)
        assert bool((shrink_(stats).gram == 1).all())
