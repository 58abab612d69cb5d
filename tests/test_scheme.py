# SPDX-License-Identifier: Apache-2.0
"""Codes and floats: the only arithmetic between them, against its definition one weight at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grids.registry import dequantize
from quantkit.scheme import QuantizedTensor, Scheme, expand
from tests.integer_parameters import encode


def grid(rows: int, groups: int, scheme: Scheme, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    if scheme.symmetric:
        scales *= torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
        return scales, torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    zeros = torch.randint(0, scheme.max_code + 1, (rows, groups), generator=generator)
    return scales, zeros.to(torch.uint8)


@pytest.mark.parametrize(("bits", "max_code", "middle"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)])
def test_codes_and_their_middle(bits: int, max_code: int, middle: int) -> None:
    scheme = Scheme(bits, 128, True)
    assert (scheme.max_code, scheme.middle) == (max_code, middle)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(SchemeError, match=f"bits: expected 2 to 8, got {bits}"):
        Scheme(bits, 128, True)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_group_sizes_out_of_range(group_size: int) -> None:
    with pytest.raises(SchemeError, match=f"group_size: .* got {group_size}"):
        Scheme(4, group_size, True)


def test_groups_of_a_row() -> None:
    assert Scheme(4, 128, True).groups(512) == 4
    assert Scheme(4, -1, True).groups(500) == 1
    assert Scheme(4, -1, True).columns_per_group(500) == 500


@pytest.mark.parametrize(
    ("group_size", "in_features", "hint"),
    [
        (128, 11_008 + 64, "use 64 or 32"),
        (96, 11_008, "use 64 or 32"),
        (256, 128 * 7, "use 128 or 64"),
        (128, 100, r"use -1 \(whole rows\)"),
        (32, 48, r"use -1 \(whole rows\)"),
    ],
)
def test_a_group_that_divides_nothing_is_told_what_would(group_size: int, in_features: int, hint: str) -> None:
    with pytest.raises(SchemeError, match=f"{in_features} is not divisible by group_size {group_size}; {hint}"):
        Scheme(4, group_size, True).groups(in_features)


def test_how_a_scheme_is_written() -> None:
    assert str(Scheme(4, 128, False)) == "W4 g128 asym"
    assert str(Scheme(3, -1, True)) == "W3 rows sym"


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_encode_finds_the_nearest_code_and_dequantize_is_its_definition(
    bits: int, symmetric: bool, rows: int, groups: int, columns: int, seed: int
) -> None:
    scheme = Scheme(bits, columns, symmetric)
    scales, zeros = grid(rows, groups, scheme, seed)
    weight = scheme.max_code * torch.randn(rows, groups * columns, generator=torch.Generator().manual_seed(seed))
    codes = encode(weight, scales, zeros, scheme)
    assert codes.dtype == torch.uint8
    found = dequantize(QuantizedTensor(codes, scales, zeros, scheme))
    for row in range(rows):
        for column in range(groups * columns):
            s, z = float(scales[row, column // columns]), int(zeros[row, column // columns])
            w, q = float(weight[row, column]), int(codes[row, column])
            levels = [(code - z) * s for code in range(scheme.max_code + 1)]
            assert float(found[row, column]) == pytest.approx(levels[q], rel=1e-6)
            nearest = min(abs(w - level) for level in levels)
            assert abs(w - levels[q]) <= nearest + 1e-4 * abs(s)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), seed=st.integers(0, 2**16))
def test_what_codes_stand_for_has_those_codes(bits: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(bits, 8, symmetric)
    scales, zeros = grid(4, 3, scheme, seed)
    codes = torch.randint(0, scheme.max_code + 1, (4, 24), generator=torch.Generator().manual_seed(seed))
    weight = dequantize(QuantizedTensor(codes.to(torch.uint8), scales, zeros, scheme))
    assert torch.equal(encode(weight, scales, zeros, scheme), codes.to(torch.uint8))


def test_g_idx_says_which_group_a_column_is_in() -> None:
    scheme = Scheme(4, 4, False)
    scales, zeros = grid(3, 2, scheme)
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    natural = torch.arange(8, dtype=torch.int32) // 4
    plain = dequantize(QuantizedTensor(codes, scales, zeros, scheme))
    torch.testing.assert_close(dequantize(QuantizedTensor(codes, scales, zeros, scheme, natural)), plain)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mixed = QuantizedTensor(codes[:, order], scales, zeros, scheme, natural[order])
    torch.testing.assert_close(dequantize(mixed), plain[:, order])


def test_ties_go_to_the_even_code_on_every_run() -> None:
    scheme = Scheme(4, -1, True)
    scales, zeros = torch.ones(1, 1).half(), torch.full((1, 1), 8, dtype=torch.uint8)
    weight = torch.tensor([[-0.5, 0.5, 1.5, 2.5, -7.5, 7.4, 100.0, -100.0]])
    assert encode(weight, scales, zeros, scheme).tolist() == [[8, 8, 10, 10, 0, 15, 15, 0]]


def test_expand_repeats_each_value_over_its_columns() -> None:
    assert expand(torch.tensor([[1, 2], [3, 4]]), 3).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_rounds_once_at_the_end(dtype: torch.dtype) -> None:
    scheme = Scheme(8, 4, False)
    scales, zeros = grid(2, 2, scheme)
    codes = torch.randint(0, 256, (2, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedTensor(codes, scales, zeros, scheme)
    assert (quantized.out_features, quantized.in_features) == (2, 8)
    assert torch.equal(dequantize(quantized, dtype), dequantize(quantized).to(dtype))
