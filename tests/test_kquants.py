# SPDX-License-Identifier: Apache-2.0
"""K-quants against what they minimise, and against the `gguf` package."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.formats.blocks import dequantize_blocks, pack_superblocks, unpack_superblocks
from quantkit.formats.gguf import K_TYPES, TYPES
from quantkit.grids.registry import dequantize
from quantkit.grids.two_level import KINDS, Kind
from quantkit.methods import gptq, rtn
from quantkit.methods.refine import refine
from quantkit.scheme import NAMED, QuantizedTensor
from quantkit.stats import output_error
from tests.gguf_models import by_the_package


@pytest.mark.parametrize("name", K_TYPES)
def test_any_bytes_mean_what_the_package_says(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (5, 2 * TYPES[name].nbytes), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack_superblocks(unpack_superblocks(raw, name)), raw)
    ours, theirs = dequantize_blocks(raw, name), by_the_package(raw, name)
    assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))


def nearest(weight: Tensor, name: str, energy: Tensor | None = None) -> QuantizedTensor:
    return rtn.quantize(weight, NAMED[name], energy=energy)


def weighted_error(weight: Tensor, quantized: QuantizedTensor, energy: Tensor) -> float:
    return float(((dequantize(quantized) - weight).square() * energy).sum())


def energy_of(columns: int) -> Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(8)))


@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99), name=st.sampled_from(K_TYPES))
@settings(max_examples=15, deadline=None)
def test_k_quants_hold_every_shape(rows: int, blocks: int, seed: int, name: str) -> None:
    weight = torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[0, :64] = 0
    found = nearest(weight, name)
    packed = pack_superblocks(found)
    assert torch.equal(dequantize_blocks(packed, name), dequantize(found))
    error = float((dequantize(found) - weight).norm() / weight.norm())
    assert error < {"q4_k": 0.09, "q5_k": 0.05, "q6_k": 0.03}[name]


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_lowers_the_error_that_counts(name: str) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[:, ::37] *= 4
    energy = energy_of(512)
    weighted = weighted_error(weight, nearest(weight, name, energy), energy)
    blind = weighted_error(weight, nearest(weight, name), energy)
    assert weighted < 0.92 * blind


@pytest.mark.parametrize(("name", "least"), [("q4_k", 0.97), ("q5_k", 0.93), ("q6_k", 0.99)])
def test_no_worse_than_a_plain_search_of_every_group(name: str, least: float) -> None:
    """The oracle: each group by itself, its range searched as llama.cpp does, in Python and without whole numbers."""
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(4)) * 0.02
    energy, kind = energy_of(512), KINDS[name]
    found = weighted_error(weight, nearest(weight, name, energy), energy)
    total = 0.0
    for row in weight.double():
        for begin in range(0, 512, kind.columns):
            part, e = row[begin : begin + kind.columns], energy[begin : begin + kind.columns].double()
            total += min(_oracle(part, e, kind, 0.05 * i - 0.9) for i in range(37))
    assert found < total / least * 1.12  # what whole-number scales may cost, less what is won by fitting again


def _oracle(part: Tensor, energy: Tensor, kind: Kind, more: float) -> float:
    if kind.zero:
        largest = part[part.abs().argmax()]
        codes = torch.round(part / (-largest / (kind.zero + more))).clamp(-kind.zero, kind.zero - 1)
        step = (energy * codes * part).sum() / (energy * codes * codes).sum()
        return float((energy * (step * codes - part) ** 2).sum())
    low = min(float(part.min()), 0.0)
    codes = torch.round((part - low) / ((float(part.max()) - low) / (kind.max_code + more))).clamp(0, kind.max_code)
    basis = torch.stack([codes, torch.ones_like(codes)], 1) * energy.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(basis, (part * energy.sqrt()).unsqueeze(1)).solution
    return float((energy * (codes * solution[0] + solution[1] - part) ** 2).sum())


@pytest.mark.parametrize("name", K_TYPES)
def test_gptq_on_the_grid_lowers_the_output_error(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    gram = inputs.T @ inputs
    weight = torch.randn(32, 256, generator=generator) * 0.02
    factor = gptq.factorize(gram)
    start = nearest(weight, name, gram.diagonal())
    found = gptq.quantize(weight, NAMED[name], factor, energy=gram.diagonal())
    assert torch.equal(found.scales, start.scales)
    assert torch.equal(found.zeros, start.zeros)
    for part in ("d", "dmin"):
        assert torch.equal(found.outer[part], start.outer[part])
    refined, lost = refine(weight, found, gram, damp=factor.damp, rounds=4)

    def error(blocks: QuantizedTensor) -> float:
        return float(output_error(dequantize(blocks) - weight, gram).sum())

    assert error(found) < 0.7 * error(start)
    assert error(refined) < 0.97 * error(found)
    assert float(lost.sum()) == pytest.approx(error(refined), rel=1e-3)


def test_k_quants_need_whole_superblocks() -> None:
    with pytest.raises(SchemeError, match="Q4_K cuts rows into superblocks of 256, got in_features 128"):
        nearest(torch.zeros(2, 128), "q4_k")
