# SPDX-License-Identifier: Apache-2.0
"""Linears that stand for another weight fail, whatever the outputs show; roundings and folds do not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.grids.registry import dequantize
from quantkit.methods import rtn
from quantkit.pipeline.compare import few_strange, strange_linears, weight_error
from quantkit.plan import LinearPlan
from quantkit.scheme import Scheme
from tests.verified import run, verify


def garbage(words: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31 - 1, words.shape, generator=generator, dtype=torch.int32)


def swapped(words: Tensor) -> Tensor:
    """The two nibbles of each byte."""
    values = words.view(torch.uint8)
    return (values >> 4 | values << 4).view(torch.int32)


BREAKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "garbage": ("qweight", garbage),
    "nibbles": ("qweight", swapped),
    "zero": ("scales", torch.zeros_like),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_broken_linear_fails_whatever_was_allowed(name: str, qwen2: Path, ids: Path, tmp_path: Path) -> None:
    out, linear = tmp_path / "out", "model.layers.1.self_attn.k_proj"
    assert run(qwen2, out, ids, method="gptq", calib=str(ids), format="gptq")["verification"]["verdict"] == "pass"
    part, change = BREAKS[name]
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{linear}.{part}" in tensors:
            tensors[f"{linear}.{part}"] = change(tensors[f"{linear}.{part}"])
            save_file(tensors, path, metadata={"format": "pt"})
    for record in ("quantkit.json", "journal.jsonl"):
        (out / record).unlink()
    found = verify(out, against=str(qwen2), evaluation=str(ids), max_ppl_increase=9.0)["verification"]
    assert found["verdict"] == "fail"
    assert any(reason.startswith(f"{linear}: its weights are not those of the original") for reason in found["reasons"])


def plans(scheme: Scheme) -> dict[str, LinearPlan]:
    return {"a": LinearPlan("layers.0.a", 0, "a", 96, 64, scheme)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_and_folding_are_no_fault(bits: int) -> None:
    torch.manual_seed(bits)
    weight, scheme = torch.randn(96, 64), Scheme(bits, 32, False)
    rows, columns = torch.rand(96, 1) * 8 + 0.1, torch.rand(1, 64) * 8 + 0.1
    rounded = rows * dequantize(rtn.quantize(weight * columns, scheme, search=False))
    assert strange_linears({"a.weight": weight}, {"a.weight": rounded}, plans(scheme)) == []
    (found,) = strange_linears({"a.weight": weight}, {"a.weight": rounded.flip(0)}, plans(scheme))
    assert found["name"] == "layers.0.a"
    assert found["error"] > 0.7 > found["expected"]


def test_the_share_that_scales_do_not_account_for() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    assert weight_error(weight, weight * torch.rand(96, 1) * torch.rand(64)) < 1e-3
    assert weight_error(weight, torch.zeros(96, 64)) == pytest.approx(1)
    half = weight.clone()
    half[::2] = 0
    assert weight_error(weight, half) == pytest.approx(0.5, abs=0.05)


def test_a_rotated_model_is_judged_by_its_outputs() -> None:
    strange = [{"name": str(number), "error": 1.0, "expected": 0.01} for number in range(4)]
    assert few_strange(strange, 8) == {"strange_linears": strange}
    assert few_strange(strange, 7) == {}
