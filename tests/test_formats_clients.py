# SPDX-License-Identifier: Apache-2.0
"""What we write, read by compressed-tensors itself; and what it writes, read by us."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.formats import FORMATS, QuantizedLayer
from quantkit.grids.registry import dequantize
from quantkit.model.family import FUSED
from quantkit.scheme import QuantizedTensor, Scheme

compressors = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized", reason="needs compressed-tensors >= 0.20 (dense packing)"
)
quantization = pytest.importorskip("compressed_tensors.quantization")
match = pytest.importorskip("compressed_tensors.utils.match")

OURS = FORMATS["compressed-tensors"]
SHAPES = [(8, 64), (5, 36), (33, 20)]  # 36 and 20 columns leave the last word of a row part empty
CASES = [
    (Scheme(bits, group_size, symmetric), shape)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for group_size in (4, -1)
    for shape in SHAPES
]


def tensor(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + scheme.bits)
    groups = scheme.groups(shape[1])
    codes = torch.randint(0, scheme.max_code + 1, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, scheme.max_code + 1, (shape[0], groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zeros.fill_(scheme.middle)
    return QuantizedTensor(codes, torch.randn(shape[0], groups, generator=generator).half(), zeros, scheme)


def signed(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.to(torch.int16) - scheme.middle).to(torch.int8)


def their_scheme(scheme: Scheme) -> Any:
    config = OURS.config([QuantizedLayer("a.o_proj", scheme)], ["lm_head"], FUSED)
    return quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=lambda value: str(value))
def test_their_packer_writes_our_bytes(scheme: Scheme, shape: tuple[int, int]) -> None:
    quantized = tensor(scheme, shape)
    ours = OURS.pack(quantized)
    packed = compressors.pack_to_int32(signed(quantized.codes, scheme), scheme.bits)
    assert torch.equal(packed, ours["weight_packed"])
    if not scheme.symmetric:
        zeros = compressors.pack_to_int32(signed(quantized.zeros, scheme), scheme.bits, packed_dim=0)
        assert torch.equal(zeros, ours["weight_zero_point"])


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=lambda value: str(value))
def test_their_decompressor_reads_our_weight(scheme: Scheme, shape: tuple[int, int]) -> None:
    quantized = tensor(scheme, shape)
    theirs = compressors.PackedQuantizationCompressor.decompress(OURS.pack(quantized), their_scheme(scheme))
    # float16 in, one rounding each: the same number
    assert torch.equal(theirs["weight"], dequantize(quantized, torch.float16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_we_read_what_they_compress(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 4, symmetric)
    quantized = tensor(scheme, (8, 64))
    scales = quantized.scales.abs() + 0.01
    expected = QuantizedTensor(quantized.codes, scales, quantized.zeros, scheme)
    state = {"weight": dequantize(expected), "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = signed(quantized.zeros, scheme)
    packed = compressors.PackedQuantizationCompressor.compress(state, their_scheme(scheme))
    again = OURS.unpack(packed, scheme, (8, 64))
    assert torch.equal(again.codes, expected.codes)
    assert torch.equal(again.zeros, expected.zeros)
    assert torch.equal(dequantize(again), dequantize(expected))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_their_meta_layout_is_our_specs(group_size: int, symmetric: bool) -> None:
    """The shapes their loader prepares before it sees a file (their zero point stays unpacked there: see 5.23)."""
    scheme = Scheme(3, group_size, symmetric)
    groups = scheme.groups(64)
    state = {
        "weight": torch.empty(8, 64, device="meta"),
        "weight_scale": torch.empty(8, groups, device="meta", dtype=torch.float16),
    }
    theirs = compressors.PackedQuantizationCompressor.compress(state, their_scheme(scheme))
    specs = OURS.specs(scheme, 8, 64)
    for key, value in theirs.items():
        assert (str(value.dtype), tuple(value.shape)) == (f"torch.{specs[key].dtype}", specs[key].shape), key


def model(layers: int) -> torch.nn.Module:
    """Modules with the names of a Qwen2, on the meta device."""

    def linears(*names: str) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({name: torch.nn.Linear(32, 32, bias=False) for name in names})

    with torch.device("meta"):
        blocks = [
            torch.nn.ModuleDict(
                {
                    "self_attn": linears("q_proj", "k_proj", "v_proj", "o_proj"),
                    "mlp": linears("gate_proj", "up_proj", "down_proj"),
                }
            )
            for _ in range(layers)
        ]
        inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
        return torch.nn.ModuleDict({"model": inner, "lm_head": torch.nn.Linear(32, 64, bias=False)})


@pytest.mark.parametrize("mixed", [False, True])
def test_their_config_finds_each_layer_its_scheme(mixed: bool) -> None:
    network = model(12)
    w4, w8 = Scheme(4, 16, symmetric=True), Scheme(8, -1, symmetric=True)
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    quantized = [
        QuantizedLayer(name, w8 if mixed and "layers.1.self_attn" in name else w4) for name in names if name not in kept
    ]
    config = quantization.QuantizationConfig.model_validate(OURS.config(quantized, kept, FUSED))
    quantization.apply_quantization_config(network, config, show_progress=False)
    found = {}
    for name, module in network.named_modules():
        if (applied := getattr(module, "quantization_scheme", None)) is not None:
            weights = applied.weights
            assert isinstance(module, torch.nn.Linear), name
            found[name] = Scheme(weights.num_bits, weights.group_size or -1, weights.symmetric)
    assert found == dict(quantized)

    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    targets = [target for group in config.config_groups.values() for target in group.targets]
    if mixed:
        for name in ("model.layers.1.self_attn.qkv_proj", "model.layers.11.self_attn.qkv_proj"):
            assert sum(match.match_name(name, target) for target in targets) == 1
            assert sum(match.match_name(name, target, fused) for target in targets) == 1
