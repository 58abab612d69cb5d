# SPDX-License-Identifier: Apache-2.0
"""AutoRound writes GPTQ on CPU: 200 iterations of signed gradients a block. FORMAT: bits and symmetry, `4 asym`."""

from pathlib import Path

import torch
from auto_round import AutoRound
from client import write
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    bits, symmetry = format.split()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rounder = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        bits=int(bits),
        group_size=128,
        sym=symmetry == "sym",
        iters=200,
        dataset=[{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones_like(row).unsqueeze(0)} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=8,
        device_map="cpu",
        amp=False,
    )
    rounder.quantize_and_save(str(out), format="auto_gptq")


write(("transformers", "auto-round"), quantize)
