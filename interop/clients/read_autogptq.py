# SPDX-License-Identifier: Apache-2.0
"""AutoGPTQ's own loader on CPU, which needs its plain torch kernel."""

from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from client import Forward, read


def load(checkpoint: Path) -> Forward:
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint),
        device="cpu",
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        torch_dtype=torch.float16,
    )
    module = model.model.float()
    return lambda ids: module(ids).logits


read(("transformers", "auto-gptq"), load)
