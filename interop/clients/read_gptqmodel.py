# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's own loader, with its torch kernels."""

import json
from pathlib import Path

import torch
from client import Forward, read
from gptqmodel import BACKEND, GPTQModel


def load(checkpoint: Path) -> Forward:
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    awq = stored["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq and hasattr(BACKEND, "TORCH_AWQ") else BACKEND.TORCH
    model = GPTQModel.load(str(checkpoint), device="cpu", backend=backend, dtype=torch.float32)
    return lambda ids: model.model(ids).logits


read(("transformers", "gptqmodel"), load)
