# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools have written, measured from their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats import FORMATS
from quantkit.grids.registry import dequantize
from quantkit.scheme import Scheme
from tests.conftest import make_qwen2
from tests.outputs import naive_figures
from tests.verified import GPTQ, Change, grid, verify, write_foreign


def bf16_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.to(torch.bfloat16) if t.dtype == torch.float16 else t for key, t in tensors.items()}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(scheme: Scheme) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": "group"}
    weights |= {"group_size": scheme.group_size, "actorder": None, "dynamic": False, "observer": "minmax"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    head = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return head | {"config_groups": {"group_0": group}, "kv_cache_scheme": None, "quantization_status": "compressed"}


def library_packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The words as compressed-tensors' own functions pack them."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rows, columns = tensors["weight_shape"].tolist()
    bits = tensors["weight_packed"].shape[1] * 32 // columns
    signed = helpers.unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, columns)))
    return bf16_scales(tensors) | {"weight_packed": helpers.pack_to_int32(signed, bits)}


@pytest.mark.parametrize(
    ("fmt", "scheme", "config", "change", "act_order"),
    [
        ("awq", Scheme(4, 32, False), AWQ | {"modules_to_not_convert": None}, bf16_scales, False),
        ("gptq", Scheme(4, 32, True), GPTQ | {"desc_act": False}, bf16_scales, False),
        ("gptq", Scheme(4, 32, True), GPTQ, lambda tensors: tensors, True),
        ("gptq_v2", Scheme(4, 32, False), GPTQ | {"sym": False, "format": "gptq_v2"}, lambda tensors: tensors, False),
        ("compressed-tensors", Scheme(4, 32, True), compressed(Scheme(4, 32, True)), library_packed, False),
        ("compressed-tensors", Scheme(3, 32, False), compressed(Scheme(3, 32, False)), bf16_scales, False),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_of_other_tools(
    tmp_path: Path,
    ids: Path,
    fmt: str,
    scheme: Scheme,
    config: dict[str, Any],
    change: Change,
    act_order: bool,
    tied: bool,
) -> None:
    model = make_qwen2(tmp_path / "model", tie_word_embeddings=tied)
    whole = write_foreign(tmp_path / "foreign", model, fmt, scheme, config, change, act_order)
    before = sorted(path.name for path in (tmp_path / "foreign").iterdir())
    result = verify(tmp_path / "foreign", against=str(model), evaluation=str(ids), max_ppl_increase=9.0)
    for name, value in naive_figures(model, whole, load_file(ids)["input_ids"]).items():
        assert result["verification"][name] == pytest.approx(value, rel=1e-5), name
    assert result["format"] == fmt
    assert result["schemes"] == {str(scheme): 14}
    assert result["verification"]["fit"]["file_bytes"] == result["total_bytes"]
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == before


def test_biases_of_zeros_change_nothing_and_others_are_refused(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    """AutoGPTQ writes a bias for each linear. Where the model has one it is the model's."""
    foreign = tmp_path / "foreign"
    write_foreign(foreign, qwen2, "gptq", Scheme(4, 32, True), GPTQ)
    plain = verify(foreign, against=str(qwen2), evaluation=str(ids))["verification"]
    tensors = load_file(foreign / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.bias"
    save_file(tensors | {name: torch.zeros(64)}, foreign / "model.safetensors")
    assert verify(foreign, against=str(qwen2), evaluation=str(ids))["verification"]["perplexity"] == plain["perplexity"]
    save_file(tensors | {name: torch.ones(64)}, foreign / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.bias"):
        verify(foreign, against=str(qwen2), evaluation=str(ids))


def test_a_quantized_head_is_measured(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    scheme = Scheme(4, 32, True)
    whole = write_foreign(tmp_path / "foreign", qwen2, "gptq", scheme, GPTQ | {"lm_head": True})
    tensors = load_file(tmp_path / "foreign" / "model.safetensors")
    head = grid(tensors.pop("lm_head.weight").float(), scheme)
    tensors |= {f"lm_head.{key}": t for key, t in FORMATS["gptq"].pack(head).items()}
    save_file(tensors, tmp_path / "foreign" / "model.safetensors")
    whole.get_parameter("lm_head.weight").data = dequantize(head)
    result = verify(tmp_path / "foreign", against=str(qwen2), evaluation=str(ids))
    for name, value in naive_figures(qwen2, whole, load_file(ids)["input_ids"]).items():
        assert result["verification"][name] == pytest.approx(value, rel=1e-5), name


def test_infinities_of_a_broken_checkpoint_are_told_and_fail(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    """A perplexity beyond a float is None in JSON, and the reason of the verdict."""
    write_foreign(tmp_path / "foreign", qwen2, "gptq", Scheme(4, 32, True), GPTQ)
    tensors = load_file(tmp_path / "foreign" / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, tmp_path / "foreign" / "model.safetensors")
    found = verify(tmp_path / "foreign", against=str(qwen2), evaluation=str(ids))["verification"]
    assert found["perplexity"] is None
    assert found["verdict"] == "fail"
    assert "perplexity is inf" in found["reasons"][0]
    json.dumps(found, allow_nan=False)
