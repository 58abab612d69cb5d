# SPDX-License-Identifier: Apache-2.0
"""AutoGPTQ writes GPTQ v1, where there is a GPU: it moves every layer there."""

from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from client import write


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    words = format.split()
    config = BaseQuantizeConfig(bits=4, group_size=128, sym="sym" in words, desc_act="act-order" in words)
    loaded = AutoGPTQForCausalLM.from_pretrained(str(model), config, torch_dtype=torch.float32)
    loaded.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
    loaded.save_quantized(str(out), use_safetensors=True)


write(("transformers", "auto-gptq"), quantize)
