# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ quantizes on CPU. Its calibration wants text, so it is given the ids as the text of a tokenizer's inverse."""

from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from client import write
from transformers import AutoTokenizer


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoAWQForCausalLM.from_pretrained(str(model), device_map={"": "cpu"}, torch_dtype=torch.float32)
    loaded.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        calib_data=[tokenizer.decode(row) for row in ids[:8]],
        max_calib_samples=len(ids),
        max_calib_seq_len=ids.shape[1],
    )
    loaded.save_quantized(str(out))


write(("transformers", "autoawq"), quantize)
