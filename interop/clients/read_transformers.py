# SPDX-License-Identifier: Apache-2.0
"""transformers with whatever the checkpoint's method makes it use: compressed-tensors, or gptqmodel and optimum.

AWQ and GPTQ run in float16, which is all that gptqmodel's kernels load in; compressed-tensors in float32.
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
    more: dict[str, Any] = {"dtype": torch.float32}
    if stored["quant_method"] in BACKENDS:
        import transformers

        name, backend = BACKENDS[stored["quant_method"]]
        more = {
            "dtype": torch.float16,
            "quantization_config": getattr(transformers, name)(bits=stored["bits"], backend=backend),
            "device_map": {"": "cpu"},
        }
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **more)
    return lambda ids: model(ids).logits


read(("transformers", "compressed-tensors", "gptqmodel", "optimum"), load)
