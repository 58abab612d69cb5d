# SPDX-License-Identifier: Apache-2.0
"""transformers on the GGUF file of a folder, which it dequantizes while it loads, in float32."""

from pathlib import Path

import torch
from client import Forward, read
from transformers import AutoModelForCausalLM


def load(checkpoint: Path) -> Forward:
    (path,) = checkpoint.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, gguf_file=path.name, dtype=torch.float32)
    return lambda ids: model(ids).logits


read(("transformers", "gguf"), load)
