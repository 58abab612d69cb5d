# SPDX-License-Identifier: Apache-2.0
"""GPTQModel writes GPTQ (v1, v2, with the columns reordered or not) and AWQ on CPU."""

from pathlib import Path

import torch
from client import write
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD


def quantize(model: Path, ids: torch.Tensor, out: Path, format: str) -> None:
    name, symmetry, *order = format.split()
    awq = name == "awq"
    config = QuantizeConfig(
        bits=4,
        group_size=128,
        sym=symmetry == "sym",
        desc_act="act-order" in order,
        method=METHOD.AWQ if awq else METHOD.GPTQ,
        format=FORMAT.GEMM if awq else FORMAT(name),
        offload_to_disk=False,
        device="cpu",
    )
    loaded = GPTQModel.load(str(model), config, dtype=torch.float16 if awq else torch.float32)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    loaded.quantize(samples, batch_size=1, backend=BACKEND.AUTO, calibration_data_min_length=1)
    loaded.save(str(out))


write(("transformers", "gptqmodel"), quantize)
