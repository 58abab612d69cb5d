# SPDX-License-Identifier: Apache-2.0
"""Models whose numbers leave float16's range: what is written says bfloat16, and the figures are of that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.formats import FORMATS
from quantkit.grids.registry import dequantize
from quantkit.scheme import Scheme
from tests.conftest import make_qwen2, make_tokenizer
from tests.outputs import naive_figures
from tests.running import done, quantkit, run_words
from tests.tiny import load_whole


def scaled(folder: Path, **factors: float) -> Path:
    """A tiny model whose layer 1 has some linears times a factor; named by the last part of their names."""
    make_qwen2(folder)
    make_tokenizer(folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            for kind, factor in factors.items():
                if name == f"model.layers.1.mlp.{kind}.weight":
                    tensors[name] = tensors[name] * factor
        save_file(tensors, path, {"format": "pt"})
    return folder


OUTPUTS = {"down_proj": 2.0**17}  # hidden states
INPUTS = {"up_proj": 2.0**10, "gate_proj": 2.0**10, "down_proj": 2.0**-20}  # what down_proj reads alone


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    return result


def served_model(out: Path, model: Path) -> torch.nn.Module:
    """The original architecture with the weights that an engine has which casts all of a file to bfloat16."""
    result = result_of(out)
    fmt = FORMATS[result["format"]]
    tensors: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(path).items()}
    for layer in result["layers"]:
        scheme = Scheme(layer["bits"], layer["group_size"], layer["symmetric"])
        shape = (layer["out_features"], layer["in_features"])
        packed = {key: tensors.pop(f"{layer['name']}.{key}") for key in fmt.specs(scheme, *shape)}
        tensors[f"{layer['name']}.weight"] = dequantize(fmt.unpack(packed, scheme, shape))
    whole = load_whole(model)
    whole.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    return whole


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("factors", [OUTPUTS, INPUTS])
def test_numbers_beyond_float16_are_served_in_bfloat16(
    tmp_path: Path, ids: Path, method: str, factors: dict[str, float]
) -> None:
    model, out = scaled(tmp_path / "model", **factors), tmp_path / "out"
    answer = done(*run_words(method, model, out, ids))
    told = answer.stderr + answer.stdout
    result = result_of(out)
    (note,) = (note for note in result["fallbacks"] if "float16 ends at 65,504" in note)
    assert "in model.layers.1" in note
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == result["torch_dtype"] == "bfloat16"
    verification = result["verification"]
    assert verification["torch_dtype"] == "bfloat16"
    assert verification["largest_activation"] > 65504
    card = (out / "README.md").read_text()
    assert 'dtype="bfloat16"' in card
    assert "--dtype bfloat16" in card
    figures = naive_figures(model, served_model(out, model), load_file(ids)["input_ids"])
    assert verification["kl_divergence"] == pytest.approx(figures["kl_divergence"], rel=1e-4)
    assert "measure once more, in bfloat16" in told
    again = done("verify", str(out), "--json", "--device", "cpu", "--eval", str(ids))
    assert json.loads(again.stdout)["verification"]["kl_divergence"] == verification["kl_divergence"]


def test_a_folder_that_says_float16_all_the_same_fails(tmp_path: Path, ids: Path) -> None:
    model, out = scaled(tmp_path / "model", **OUTPUTS), tmp_path / "out"
    done(*run_words("rtn", model, out, ids))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    for name in ("quantkit.json", "journal.jsonl"):  # as another tool leaves it
        (out / name).unlink()
    answer = quantkit("verify", str(out), "--against", str(model), "--eval", str(ids), "--device", "cpu")
    assert answer.returncode == 3
    assert '"torch_dtype": "bfloat16"' in " ".join((answer.stdout + answer.stderr).split())


def test_without_evaluation_what_calibrates_is_watched(tmp_path: Path, ids: Path) -> None:
    model, out = scaled(tmp_path / "model", **OUTPUTS), tmp_path / "out"
    done(*run_words("gptq", model, out, ids, "--no-verify"))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_float16_holds_is_served_in_it(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    told = done(*run_words("gptq", qwen2, out, ids)).stdout
    result = result_of(out)
    assert result["torch_dtype"] == result["verification"]["torch_dtype"] == "float16"
    assert 0 < result["verification"]["largest_activation"] < 65504
    assert "--dtype" not in (out / "README.md").read_text()
    assert "once more" not in told


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_what_float16_cannot_store_is_told_before_the_first_layer(name: str, tmp_path: Path, ids: Path) -> None:
    model = make_qwen2(tmp_path / "model")
    make_tokenizer(model)
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3] = 1e5
            save_file(tensors, path, {"format": "pt"})
    answer = quantkit(*run_words("awq", model, tmp_path / "out", ids))
    assert answer.returncode == 1
    assert f"{name}: largest value" in " ".join(answer.stderr.split())
    assert "layer 1 of" not in answer.stderr
