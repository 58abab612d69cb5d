# SPDX-License-Identifier: Apache-2.0
"""AutoRound writes GPTQ: 200 iterations of signed gradients a block, on a GPU (as it likes to) where there is one.

FORMAT: bits and symmetry, `4 asym`.
"""

from pathlib import Path

import torch
from auto_round import AutoRound
from client import write
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    bits, symmetry = format.split()
    on_gpu = torch.cuda.is_available()
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
        device_map="cuda:0" if on_gpu else "cpu",
        amp=on_gpu,  # 16-bit products are slow on CPUs
    )
    rounder.quantize_and_save(str(out), format="auto_gptq")
    (folder,) = (path for path in out.iterdir() if path.is_dir())  # named by itself
    for path in folder.iterdir():
        path.rename(out / path.name)


write(("transformers", "auto-round"), quantize)
