# SPDX-License-Identifier: Apache-2.0
"""transformers with whatever the checkpoint's method makes it use: compressed-tensors, or gptqmodel and optimum.

Loaded in float16, as it is stored, and run in float32 as far as the kernels do (AWQ's compute in float16).
"""

import json
from pathlib import Path
from typing import Any

import torch
from client import Forward, read
from transformers import AutoModelForCausalLM

# The kernels that run on any CPU; without them a GPU kernel may be chosen and fail.
BACKENDS = {"awq": ("AwqConfig", "torch_awq"), "gptq": ("GPTQConfig", "torch")}


def load(checkpoint: Path) -> Forward:
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    more: dict[str, Any] = {}
    if stored["quant_method"] in BACKENDS:
        import transformers

        name, backend = BACKENDS[stored["quant_method"]]
        more = {
            "quantization_config": getattr(transformers, name)(bits=stored["bits"], backend=backend),
            "device_map": {"": "cpu"},
        }
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, **more).float()
    return lambda ids: model(ids).logits


read(("transformers", "compressed-tensors", "gptqmodel", "optimum"), load)
