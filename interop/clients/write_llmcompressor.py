# SPDX-License-Identifier: Apache-2.0
"""llm-compressor writes compressed-tensors on CPU: GPTQ symmetric, and AWQ asymmetric."""

from pathlib import Path

import torch
from client import write
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

if not torch.cuda.is_available():  # its AWQ pins memory, which asks for an accelerator
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    method, symmetry = format.split()
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetry == "sym", strategy="group", group_size=128)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    scheme |= {"ignore": ["lm_head"]}
    recipe = [GPTQModifier(**scheme) if method == "gptq" else AWQModifier(**scheme)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    oneshot(
        model=loaded,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    loaded.save_pretrained(out, save_compressed=True)


write(("transformers", "compressed-tensors", "llmcompressor"), quantize)
