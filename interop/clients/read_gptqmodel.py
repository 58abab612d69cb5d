# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's own loader, with its torch kernels.

They load in float16 whatever is asked for. The model then runs in float32 as far as its kernels do: those of GPTQ
follow, those of AWQ compute in float16.
"""

import json
from pathlib import Path

import torch
from client import Forward, read
from gptqmodel import BACKEND, GPTQModel


def load(checkpoint: Path) -> Forward:
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    awq = stored["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    model = GPTQModel.load(str(checkpoint), device="cpu", backend=backend, dtype=torch.float16)
    module = model.model.float()
    return lambda ids: module(ids).logits


read(("transformers", "gptqmodel"), load)
