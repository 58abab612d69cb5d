# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's own modules on CPU.

Its `from_quantized` insists on a package for Intel CPUs that newer torch does not have. What follows are its steps
without that: its config reader, its WQLinear_GEMM in place of the linears, its loader, its own dequantization.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from awq.models._config import AwqConfig
from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
from client import Forward, read
from transformers import AutoConfig, AutoModelForCausalLM


def load(checkpoint: Path) -> Forward:
    config = AutoConfig.from_pretrained(checkpoint)
    own = AWQ_CAUSAL_LM_MODEL_MAP[config.model_type]
    quantization = AwqConfig.from_pretrained(str(checkpoint))
    del config.quantization_config  # transformers would load its own kernels
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    own._load_quantized_modules(
        own, model, quantization, quantization.version, use_exllama=False, use_exllama_v2=False, use_ipex=False
    )
    model.tie_weights()
    load_checkpoint_and_dispatch(
        model,
        checkpoint=str(checkpoint),
        device_map={"": "cpu"},
        no_split_module_classes=[own.layer_type],
        dtype=torch.float16,
    )
    model.eval()
    return lambda ids: model(ids).logits


read(("transformers", "autoawq"), load)
