# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other tools in other formats: act-order, padded words, bfloat16 scales, heads."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.errors import ModelError, SchemeError
from quantkit.grids.registry import dequantize
from quantkit.scheme import QuantizedTensor, Scheme
from tests.foreign import W4, assert_held, edit, foreign, rewrite, same, shuffled, tensors, to, unpacked


def exchanged(name: str, quantized: QuantizedTensor) -> QuantizedTensor:
    """The groups in another order, each still of neighbours."""
    groups = quantized.scales.shape[1]
    labels = torch.arange(groups).flip(0).repeat_interleave(quantized.scheme.group_size)
    return replace(quantized, g_idx=labels.int())


def test_act_order_stays_in_gptq(tmp_path: Path) -> None:
    held = foreign(tmp_path / "gptq", "gptq", replace(W4, symmetric=True), change=shuffled)
    to(tmp_path / "gptq", "gptq_v2", tmp_path / "v2")
    assert_held(tmp_path / "v2", "gptq_v2", held)
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    with pytest.raises(SchemeError, match=r"(?s)13 other linears.*act-order.*--requantize"):
        to(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_groups_of_neighbours_are_put_in_order(tmp_path: Path) -> None:
    held = foreign(tmp_path / "gptq", "gptq_v2", change=exchanged)
    result = to(tmp_path / "gptq", "awq", tmp_path / "awq")
    assert result["converted"]["lossless"]
    for name, quantized in held.items():
        found = unpacked(tmp_path / "awq", name, "awq", W4, (quantized.out_features, quantized.in_features))
        assert torch.equal(found.scales, quantized.scales.flip(1))
        assert torch.equal(dequantize(found), dequantize(quantized))


def test_padded_words_of_older_compressed_tensors(tmp_path: Path) -> None:
    """3-bit words of 10 codes, as 0.17 wrote them, become the dense stream of 0.20; gptq has the same codes."""
    scheme = Scheme(3, 32, False)
    held = foreign(tmp_path / "ct", "compressed-tensors", scheme)

    def pad(state: dict[str, Tensor]) -> None:
        for name, quantized in held.items():
            state[f"{name}.weight_packed"] = padded(quantized.codes, 3)
            state[f"{name}.weight_zero_point"] = padded(quantized.zeros.t(), 3).t().contiguous()

    rewrite(tmp_path / "ct", pad)
    to(tmp_path / "ct", "compressed-tensors", tmp_path / "dense")
    assert_held(tmp_path / "dense", "compressed-tensors", held)
    name, quantized = next(iter(held.items()))
    packed = tensors(tmp_path / "dense")[f"{name}.weight_packed"]
    assert packed.shape == (quantized.out_features, math.ceil(quantized.in_features * 3 / 32))
    to(tmp_path / "ct", "gptq_v2", tmp_path / "gptq")
    assert_held(tmp_path / "gptq", "gptq_v2", held)


def padded(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] -> int32 [rows, ceil(n / per word)], whole codes only, one by one."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], math.ceil(codes.shape[1] / per_word), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // per_word] |= codes[:, column].long() << bits * (column % per_word)
    return words.where(words < 2**31, words - 2**32).int()


def test_bfloat16_scales(tmp_path: Path) -> None:
    """Those that float16 holds exactly go anywhere; others only where they are stored as they are."""
    held = foreign(tmp_path / "ct", "compressed-tensors")

    def round_scales(state: dict[str, Tensor], factor: float) -> None:
        for name in held:
            state[f"{name}.weight_scale"] = (state[f"{name}.weight_scale"].float() * factor).bfloat16()

    rewrite(tmp_path / "ct", lambda state: round_scales(state, 1.0))
    to(tmp_path / "ct", "awq", tmp_path / "awq")
    scales = {name: tensors(tmp_path / "ct")[f"{name}.weight_scale"].half() for name in held}
    assert_held(tmp_path / "awq", "awq", {n: replace(q, scales=scales[n]) for n, q in held.items()})

    rewrite(tmp_path / "ct", lambda state: round_scales(state, 2.0**-14))  # float16 loses bits of these
    with pytest.raises(SchemeError, match="scales in bfloat16 that float16 does not hold"):
        to(tmp_path / "ct", "awq", tmp_path / "refused")
    to(tmp_path / "ct", "compressed-tensors", tmp_path / "again")
    assert same(tensors(tmp_path / "ct"), tensors(tmp_path / "again"))
    result = to(tmp_path / "ct", "awq", tmp_path / "rounded", requantize=True)
    assert 0 < result["converted"]["weight_error"]["worst"] < 0.05  # the codes are as they were
    name, quantized = next(iter(held.items()))
    found = unpacked(tmp_path / "rounded", name, "awq", W4, (quantized.out_features, quantized.in_features))
    assert torch.equal(found.codes, quantized.codes)


def test_stored_zero_points_in_the_middle_are_symmetric(tmp_path: Path) -> None:
    def middle(name: str, quantized: QuantizedTensor) -> QuantizedTensor:
        return replace(quantized, zeros=torch.full_like(quantized.zeros, 8))

    foreign(tmp_path / "awq", change=middle)
    to(tmp_path / "awq", "gptq", tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["sym"] is True


def test_a_quantized_head(tmp_path: Path) -> None:
    held = foreign(tmp_path / "gptq", "gptq_v2", head=True)
    assert "lm_head" in held
    to(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    assert_held(tmp_path / "ct", "compressed-tensors", held)
    to(tmp_path / "ct", "gptq_v2", tmp_path / "again")
    assert same(tensors(tmp_path / "gptq"), tensors(tmp_path / "again"))
    with pytest.raises(SchemeError, match="lm_head"):
        to(tmp_path / "gptq", "awq", tmp_path / "awq")


def test_tensors_without_a_place(tmp_path: Path) -> None:
    """AutoGPTQ writes a bias of zeros where there is none; anything else would be lost."""
    held = foreign(tmp_path / "gptq", "gptq")
    bias = "model.layers.0.mlp.down_proj.bias"
    rewrite(tmp_path / "gptq", lambda state: state.update({bias: torch.zeros(64, dtype=torch.float16)}))
    result = to(tmp_path / "gptq", "awq", tmp_path / "awq")
    assert any(bias in note for note in result["fallbacks"])
    assert_held(tmp_path / "awq", "awq", held)
    rewrite(tmp_path / "gptq", lambda state: state.update({bias: torch.ones(64, dtype=torch.float16)}))
    with pytest.raises(ModelError, match=r"down_proj\.bias"):
        to(tmp_path / "gptq", "awq", tmp_path / "other")


def test_who_made_it_is_kept(tmp_path: Path) -> None:
    foreign(tmp_path / "gptq", "gptq")
    edit(tmp_path / "gptq", lambda raw: raw["quantization_config"].update(meta={"quantizer": ["gptqmodel:7.7.0"]}))
    result = to(tmp_path / "gptq", "awq", tmp_path / "awq")
    assert result["converted"]["made_by"] == "gptqmodel:7.7.0"
    assert result["converted"]["source"].keys() == {"config.json", "model.safetensors"}
    assert result["verification"] is None
    page = (tmp_path / "awq" / "README.md").read_text()
    assert "converted from gptq, made by gptqmodel:7.7.0" in page
