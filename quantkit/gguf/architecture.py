# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp calls a model's tensors and hyperparameters, by the row of its architecture.

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
from quantkit.model.architectures import FAMILIES
from quantkit.model.family import Gguf, evaluate
from quantkit.model.shapes import Shapes

ROPE_FACTORS = "rope_freqs.weight"


def gguf_of(model: Shapes) -> Gguf:
    """The names of the model's architecture.

    Raises:
        ModelError: an architecture without them.
    """
    if model.family.gguf is None:
        known = ", ".join(kind for kind, family in FAMILIES.items() if family.gguf is not None)
        raise ModelError(f"gguf: no row for {model.config.model_type}; expected {known}")
    return model.family.gguf


def check_architecture(model: Shapes) -> None:
    """Refuse what llama.cpp would not compute, or would compute otherwise.

    Raises:
        ModelError: an architecture without a row; sliding windows; rotations that are not known here.
    """
    gguf_of(model)
    config = model.config
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if window and window < positions and getattr(config, "use_sliding_window", True):
        raise ModelError(
            f"gguf: {config.model_type} with a sliding window of {window} tokens: llama.cpp would attend to all "
            f"{positions}; set sliding_window to null if contexts stay below {window}"
        )
    rotation = rope_of(config).get("rope_type", "default")
    if rotation not in ("default", "linear", "yarn", "llama3"):
        raise ModelError(f"gguf: rope_type {rotation!r:.40}: expected default, linear, yarn or llama3")


def tensor_name(model: Shapes, name: str) -> str:
    """The name in a GGUF file of a parameter of the model.

    Raises:
        ModelError: llama.cpp has no such tensor in this architecture.
    """
    names = gguf_of(model)
    if name in names.outside:
        return names.outside[name]
    index, local = _place(model, name)
    module, _, leaf = local.rpartition(".")
    if module in names.modules and leaf in ("weight", "bias"):
        return f"blk.{index}.{names.modules[module]}.{leaf}"
    raise ModelError(f"{name}: has no place in a gguf file")


def permutation(model: Shapes, name: str, rows: int) -> Tensor | None:
    """The order in which llama.cpp has the rows of a q or k projection (int64 [rows]); None: as they are."""
    module = _place(model, name)[1].rpartition(".")[0]
    count = gguf_of(model).paired.get(module)
    if count is None:
        return None
    heads = evaluate(count, model.config)
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _place(model: Shapes, name: str) -> tuple[str, str]:
    """The number of a parameter's layer, and its name within it; both empty outside the layers."""
    if not name.startswith(f"{model.layers_name}."):
        return "", ""
    index, _, local = name.removeprefix(f"{model.layers_name}.").partition(".")
    return index, local


def hyperparameters(model: Shapes) -> dict[str, Value]:
    """The keys that llama.cpp builds the model from."""
    names, config = gguf_of(model), model.config
    rope = rope_of(config)
    theta = rope.get("rope_theta", 10000.0)
    values = {key: evaluate(value, config, rope_theta=theta) for key, value in names.keys.items()}
    keys: dict[str, Value] = {key: float(value) if key in names.reals else value for key, value in values.items()}
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
    return {f"{names.name}.{key}": value for key, value in keys.items()}


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """By how much each rotation is slowed down (float32 [head_dim / 2]), for rope_type llama3; None for the others."""
    rope = rope_of(config)
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


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """The rotary embedding by a config: transformers 5 has `rope_parameters`; 4 has `rope_theta` and `rope_scaling`."""
    found = getattr(config, "rope_parameters", None)
    if isinstance(found, Mapping) and found:
        return found
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    return {"rope_type": kind, "rope_theta": getattr(config, "rope_theta", 10000.0)} | scaling
