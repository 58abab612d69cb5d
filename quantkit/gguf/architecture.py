# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp calls a model's tensors and hyperparameters: one row of data per architecture.

Names and keys are those of llama.cpp's gguf-py (constants.py, tensor_mapping.py) and convert_hf_to_gguf.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from quantkit.errors import ModelError
from quantkit.gguf.file import Value

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}  # model_type -> name
PERMUTED = ("llama", "mistral")  # llama.cpp rotates neighbouring pairs of their q and k, transformers halves

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def check_architecture(config: PretrainedConfig) -> None:
    """Refuse what llama.cpp would not compute, or would compute otherwise.

    Raises:
        ModelError: an architecture without a row; sliding windows; rotations that are not known here.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(f"gguf: no row for {kind}; expected {', '.join(ARCHITECTURES)}")
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if window and window < positions and getattr(config, "use_sliding_window", True):
        raise ModelError(
            f"gguf: {kind} with a sliding window of {window} tokens: llama.cpp would attend to all {positions}; "
            f"set sliding_window to null if contexts stay below {window}"
        )
    rotation = _rope(config).get("rope_type", "default")
    if rotation not in ("default", "linear", "yarn", "llama3"):
        raise ModelError(f"gguf: rope_type {rotation!r:.40}: expected default, linear, yarn or llama3")


def tensor_name(name: str) -> str:
    """The name in a GGUF file of a parameter of the model.

    Raises:
        ModelError: llama.cpp has no such tensor in these architectures.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"]:
        module, _, leaf = parts[3].rpartition(".")
        if module in MODULES and leaf in ("weight", "bias"):
            return f"blk.{parts[2]}.{MODULES[module]}.{leaf}"
    raise ModelError(f"{name}: has no place in a gguf file")


def permutation(config: PretrainedConfig, name: str, rows: int) -> Tensor | None:
    """The order in which llama.cpp has the rows of a q or k projection (int64 [rows]); None: as they are."""
    if config.model_type not in PERMUTED or ".self_attn." not in name:
        return None
    module = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)
    if heads is None:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def hyperparameters(config: PretrainedConfig) -> dict[str, Value]:
    """The keys that llama.cpp builds the model from."""
    arch = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    keys: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
        more = {
            "extrapolation_factor": "yarn_ext_factor",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        keys |= {f"rope.scaling.{key}": float(rope[name]) for name, key in more.items() if rope.get(name) is not None}
    return {f"{arch}.{key}": value for key, value in keys.items()}


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """By how much each rotation is slowed down (float32 [head_dim / 2]), for rope_type llama3; None for the others."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down wholly, 1: not at all
    slower: Tensor = 1 / ((1 - share) / factor + share)
    return slower.float()


def _rope(config: PretrainedConfig) -> Mapping[str, Any]:
    """transformers 5 has `rope_parameters`; 4 has `rope_theta` and `rope_scaling`."""
    found = getattr(config, "rope_parameters", None)
    if isinstance(found, Mapping) and found:
        return found
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    return {"rope_type": kind, "rope_theta": getattr(config, "rope_theta", 10000.0)} | scaling
