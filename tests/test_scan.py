# SPDX-License-Identifier: Apache-2.0
"""NaN and infinities are found before work begins, wherever they are."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.original import as_numbers
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.scan import INFINITY, require_finite_weights
from quantkit.dtypes import torch_dtype
from quantkit.errors import NumericsError
from tests.running import quantkit, run_words


@pytest.mark.parametrize("dtype", INFINITY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_dtype_is_looked_through(dtype: str, value: float, tmp_path: Path) -> None:
    kind = torch_dtype(dtype)
    most = min(torch.finfo(kind).max, torch.finfo(torch.float32).max)
    largest, least = (torch.full((3, 1000), value).to(kind) for value in (most, -most))
    tensors = {"a": largest, "b": least, "c": torch.zeros(0), "d": torch.full((5,), -1)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    require_finite_weights(checkpoint, checkpoint.entries)
    tensors["b"][2, 999] = value
    if torch.isfinite(tensors["b"].float()).all():
        pytest.skip(f"{dtype} has no infinity")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(NumericsError, match=r"b in model.safetensors: 1 of 3000 values are NaN or infinite"):
        require_finite_weights(open_checkpoint(tmp_path), checkpoint.entries)


@pytest.mark.parametrize("place", ["weight", "scale"])
def test_scaled_weights_and_their_scales_too(place: str, tmp_path: Path) -> None:
    weight, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1)
    (weight if place == "weight" else scale)[1] = float("nan")
    save_file({"a.weight": weight, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    checkpoint = as_numbers(open_checkpoint(tmp_path), {})
    with pytest.raises(NumericsError, match=r"a\.weight in model.safetensors: 4 of 16"):
        require_finite_weights(checkpoint, checkpoint.entries)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_in_the_last_layer_is_told_before_the_first_is_quantized(
    method: str, qwen2: Path, ids: Path, tmp_path: Path
) -> None:
    shutil.copytree(qwen2, tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3, 5] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    refused = quantkit(*run_words(method, tmp_path / "model", tmp_path / "out", ids))
    assert refused.returncode == 1
    assert f"{name} in model-" in refused.stderr.replace("\n", " ")
    assert "layer 1 of" not in refused.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
