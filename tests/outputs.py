# SPDX-License-Identifier: Apache-2.0
"""What a run has left, and its figures computed the slow way."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantkit.formats import FORMATS
from quantkit.grids.registry import dequantize
from quantkit.scheme import Scheme
from tests.tiny import load_whole


def contents(out: Path) -> dict[str, str]:
    """sha256 of every file whose bytes a run determines: all but the records of time and memory."""
    varying = {"quantkit.json", "report.html", "README.md"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.name not in varying
    }


def decoded_model(out: Path, model: Path) -> torch.nn.Module:
    """The original architecture in float32 with the weights that the files of `out` stand for."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    result = json.loads((out / "quantkit.json").read_text())
    fmt = FORMATS[result["format"]]
    tensors: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    assert config["quant_method"] in ("awq", "gptq", "compressed-tensors")
    for layer in result["layers"]:
        scheme = Scheme(layer["bits"], layer["group_size"], layer["symmetric"])
        shape = (layer["out_features"], layer["in_features"])
        packed = {key: tensors.pop(f"{layer['name']}.{key}") for key in fmt.specs(scheme, *shape)}
        tensors[f"{layer['name']}.weight"] = dequantize(fmt.unpack(packed, scheme, shape))
    loaded = load_whole(model)
    missing = loaded.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    return loaded


def naive_figures(model: Path, quantized: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    reference = load_whole(model)
    with torch.no_grad():
        p = reference(ids).logits[:, :-1].double().log_softmax(-1)
        q = quantized(ids).logits[:, :-1].double().log_softmax(-1)
    targets = ids[:, 1:].unsqueeze(-1)
    return {
        "perplexity": float((-q.gather(-1, targets)).mean().exp()),
        "perplexity_fp16": float((-p.gather(-1, targets)).mean().exp()),
        "kl_divergence": float((p.exp() * (p - q)).sum(-1).mean()),
    }
