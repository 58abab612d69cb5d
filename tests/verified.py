# SPDX-License-Identifier: Apache-2.0
"""Runs and verifications that the tests of both share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.commands.quantize import quantize
from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.formats import FORMATS
from quantkit.grids.registry import dequantize
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import QuantizedTensor, Scheme
from quantkit.settings.request import Request
from tests.tiny import load_whole

QUIET = Terminal(quiet=True)


def verify(out: Path, **said: Any) -> dict[str, Any]:
    return verify_files(VerifyRequest(out=out, command="quantkit verify", offline=True, **said), QUIET).content()


def run(model: Path, out: Path, ids: Path, **said: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "method": "rtn",
        "group_size": 32,
        "evaluation": str(ids),
        "offline": True,
        "max_ppl_increase": 9.0,
    }
    request = Request(model=str(model), command="quantkit rtn", out=out, **(fixed | said))
    return quantize(request, QUIET)[0].content()


def grid(weight: Tensor, scheme: Scheme, g_idx: Tensor | None = None) -> QuantizedTensor:
    """Rounded to nearest; with g_idx [in] each column on the grid of its own group."""
    columns = scheme.columns_per_group(weight.shape[1])
    group = g_idx.long() if g_idx is not None else torch.arange(weight.shape[1]) // columns
    low, high = (
        torch.stack([pick(weight[:, group == g], 1).values for g in range(int(group.max()) + 1)], 1)
        for pick in (torch.min, torch.max)
    )
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        scales = torch.maximum(-low, high) / (scheme.middle - 0.5)
        zeros = torch.full_like(scales, scheme.middle)
    else:
        scales = (high - low) / scheme.max_code
        zeros = torch.round(-low / scales).clamp(1, scheme.max_code)
    scales = scales.half()
    codes = torch.round(weight / scales.float()[:, group]) + zeros[:, group]
    codes = codes.clamp(0, scheme.max_code).to(torch.uint8)
    return QuantizedTensor(codes, scales, zeros.to(torch.uint8), scheme, None if g_idx is None else g_idx.int())


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def write_foreign(
    folder: Path,
    model: Path,
    fmt: str,
    scheme: Scheme,
    config: dict[str, Any],
    change: Change = lambda tensors: tensors,
    act_order: bool = False,
) -> torch.nn.Module:
    """A checkpoint as another tool leaves it, in one file; returns the model that it stands for, in float32."""
    whole = load_whole(model)
    tensors = {name: t.to(torch.bfloat16) for name, t in whole.state_dict().items()}
    if whole.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, linear in whole.model.layers.named_modules(prefix="model.layers"):
        if isinstance(linear, torch.nn.Linear):
            groups = torch.arange(linear.in_features) // scheme.columns_per_group(linear.in_features)
            shuffled = groups[torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(3))]
            quantized = grid(linear.weight.detach(), scheme, shuffled if act_order else None)
            files = change(FORMATS[fmt].pack(quantized))
            key = "weight_scale" if "weight_scale" in files else "scales"
            stored = files[key] if key == "weight_scale" else files[key].t()
            exact = QuantizedTensor(quantized.codes, stored, quantized.zeros, scheme, quantized.g_idx)
            linear.weight.data = dequantize(exact)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{k}": t for k, t in files.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return whole


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}  # as AutoGPTQ
