# SPDX-License-Identifier: Apache-2.0
"""Configs as transformers 5 saves them: infinities in words, attributes by layer, models without attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.running import done

SIZES = {"num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
MODELS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {  # time_step_limit ends in {"__float__": "Infinity"}
        **ATTENTION,
        "shared_intermediate_size": 128,
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "gemma4_text": {  # heads of another width in layers that see everything
        **ATTENTION,
        **ALTERNATING,
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 32,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "num_heads": 4},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
}


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
@pytest.mark.parametrize("kind", MODELS)
def test_every_command_reads_what_a_run_wrote(tmp_path: Path, ids: Path, kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model, out = tmp_path / "model", tmp_path / "out"
    config = AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(model)
    few = tmp_path / "few.safetensors"
    save_file({"input_ids": torch.arange(64).view(2, 32)}, few)
    loose = ["--max-ppl-increase", "9900%", "--max-kl", "99", "--device", "cpu"]
    asked = ["--group", "32", "--format", "compressed-tensors", "--eval", str(few), "--out", str(out)]
    done("rtn", str(model), *asked, *loose)
    measured = json.loads((out / "quantkit.json").read_text())["verification"]
    again = json.loads(done("verify", str(out), "--device", "cpu", "--json").stdout)["verification"]
    assert again["perplexity"] == measured["perplexity"]
    assert again["reasons"] == measured["reasons"]
    for words in (["fit", str(out)], ["fit", str(model), "--group", "32", "--format", "compressed-tensors"]):
        assert json.loads(done(*words, "--json").stdout)["fits"]
    assert "rtn" in done("inspect", str(out)).stdout
    done("convert", str(out), "--to", "fp16", "--out", str(tmp_path / "plain"))
