# SPDX-License-Identifier: Apache-2.0
"""transformers with compressed-tensors asked to dequantize while it loads, in float32."""

from pathlib import Path

import torch
from client import Forward, read
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def load(checkpoint: Path) -> Forward:
    asked = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=asked)
    return lambda ids: model(ids).logits


read(("transformers", "compressed-tensors"), load)
