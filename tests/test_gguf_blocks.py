# SPDX-License-Identifier: Apache-2.0
"""Blocks of integers against the `gguf` package."""

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SchemeError
from quantkit.formats.blocks import dequantize_blocks, inexact_lows, pack, settle, unpack
from quantkit.formats.gguf import TYPES, usual_type
from quantkit.grids.registry import dequantize
from quantkit.scheme import Scheme
from tests.gguf_models import INTEGERS, by_the_package, random_integers


@given(rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 99), name=st.sampled_from(list(INTEGERS)))
@settings(max_examples=40, deadline=None)
def test_integers_go_in_and_come_out(rows: int, blocks: int, seed: int, name: str) -> None:
    quantized = settle(random_integers(INTEGERS[name], rows, 32 * blocks, seed))
    packed = pack(quantized, name)
    assert packed.shape == (rows, TYPES[name].row_bytes(32 * blocks))
    weight = dequantize(quantized)
    assert torch.equal(dequantize_blocks(packed, name), weight)
    assert torch.equal(by_the_package(packed, name), weight)
    if not (quantized.scales == 0).any():
        back = unpack(packed, name, quantized.scheme)
        assert torch.equal(back.codes, quantized.codes)
        assert torch.equal(back.scales, quantized.scales)
        assert torch.equal(back.zeros, quantized.zeros)


@pytest.mark.parametrize("name", list(INTEGERS))
def test_the_packages_own_rounding_is_read_and_written_byte_for_byte(name: str) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    golden = torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[name.upper()]))
    assert torch.equal(dequantize_blocks(golden, name), by_the_package(golden, name))
    if name != "q4_1":  # its lows are no whole number of steps
        assert torch.equal(pack(unpack(golden, name, INTEGERS[name]), name), golden)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(Scheme(3, 32, True), "q4_0"), (Scheme(2, 64, True), "q4_0"), (Scheme(4, 128, True), "q4_0"),
     (Scheme(4, -1, True), "q4_0"), (Scheme(5, 32, True), "q8_0"), (Scheme(4, 128, False), "q8_0"),
     (Scheme(7, 32, False), "q8_0"), (Scheme(3, 64, False), "q4_1")],
)  # fmt: skip
def test_wider_groups_and_fewer_bits_lose_nothing(scheme: Scheme, name: str) -> None:
    quantized = settle(random_integers(scheme, 4, 256))
    assert torch.equal(dequantize_blocks(pack(quantized, name), name), dequantize(quantized))


def test_the_lowest_code_of_q8_0_is_stored() -> None:
    quantized = random_integers(INTEGERS["q8_0"], 1, 32)
    quantized.codes[0, 0] = 0
    assert float(dequantize_blocks(pack(quantized, "q8_0"), "q8_0")[0, 0]) == -128 * float(quantized.scales[0, 0])


def test_what_no_block_holds_is_refused_with_what_would() -> None:
    with pytest.raises(SchemeError, match="q8_0 is symmetric; quantize with --sym"):
        usual_type(Scheme(8, 32, False))
    with pytest.raises(SchemeError, match="blocks of 32, got group_size 16; use --group 32"):
        pack(random_integers(Scheme(4, 16, True), 2, 64), "q4_0")
    with pytest.raises(SchemeError, match="no zero points"):
        pack(random_integers(INTEGERS["q4_1"], 2, 64), "q4_0")
    with pytest.raises(SchemeError, match="no group index"):
        pack(replace(random_integers(INTEGERS["q4_0"], 2, 64), g_idx=torch.arange(64)), "q4_0")


def test_lows_that_float16_does_not_hold_are_counted_refused_and_settled() -> None:
    quantized = random_integers(INTEGERS["q4_1"], 64, 512)
    count = inexact_lows(quantized)
    assert count > 0
    with pytest.raises(SchemeError, match=f"inexact in {count} of 1024 groups"):
        pack(quantized, "q4_1")
    rounded = dequantize_blocks(pack(quantized, "q4_1", exact=False), "q4_1")
    assert 0 < float((rounded - dequantize(quantized)).abs().max()) < 2**-11 * 15 * 0.04
    settled = settle(quantized)
    assert inexact_lows(settled) == 0
    moved = (settled.scales.float() / quantized.scales.float() - 1).abs()
    assert float(moved[quantized.scales.abs() > 1e-4].max()) <= 2**-7
    powers = (quantized.zeros & (quantized.zeros - 1)) == 0
    assert torch.equal(settled.scales[powers], quantized.scales[powers])
    assert torch.equal(settle(settled).scales, settled.scales)
