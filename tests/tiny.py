# SPDX-License-Identifier: Apache-2.0
"""Random models of any family, small enough to run in milliseconds, and the whole of one streamed layer by layer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quantkit.model.config import auto_class, config_from_dict
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embed,
    logits,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
)
from quantkit.quantized import QuantizedCheckpoint

SIZES = {
    "hidden_size": 48,  # its square root is no bfloat16
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_tiny(
    folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "50MB", **changes: Any
) -> Path:
    """A random model of the family, every parameter (biases and norms too) away from its initial value."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in (SIZES | changes).items() if value is not None}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "depth": 2,  # as others call them
    "num_heads": 2,
}
IMAGES = {"gemma4": {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 2}}  # tokens that it looks up
IMAGES["gemma4_unified"] = IMAGES["gemma4"]


def tiny_tower(kind: str, text: dict[str, Any], vision: dict[str, Any]) -> PretrainedConfig:
    """The config of a small model with a vision tower; text, vision: what differs in the decoder, and in the tower."""
    make: Any = CONFIG_MAPPING[kind]
    usual = make()
    config = make(
        text_config={"model_type": usual.text_config.model_type, **SIZES, **text},
        vision_config={"model_type": getattr(usual.vision_config, "model_type", f"{kind}_vision"), **TOWER, **vision},
        **IMAGES.get(kind, {}),
    )
    assert isinstance(config, PretrainedConfig)
    return config


def save_tiny_tower(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a config, as `save_tiny` makes them."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def load_whole(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, in float32."""
    keyword = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # renamed in transformers 4.56
    config = config_from_dict(json.loads((folder / "config.json").read_text()))
    model = auto_class(config).from_pretrained(folder, **{keyword: torch.float32}).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def as_float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def random_ids(samples: int, seqlen: int = 24) -> Tensor:
    return torch.randint(3, 128, (samples, seqlen), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stream_logits(
    model: StreamedModel, ids: Tensor, batch: int = 2, quantized: QuantizedCheckpoint | None = None
) -> Tensor:
    """Token ids [samples, seqlen] -> logits, one layer at a time for all micro-batches.

    quantized: the checkpoint whose weights the model is run with instead of its own
    """
    outside = as_float(quantized.read(list(model.outside())) if quantized else read_outside(model))
    with outside_loaded(model, outside):
        states = [embed(model, part) for part in ids.split(batch)]
    for index, layer in enumerate(model.layers):
        front = f"{model.layer_name(index)}."
        names = [f"{front}{name}" for name in model.layer_shapes(index)]
        stored = {n.removeprefix(front): t for n, t in quantized.read(names).items()} if quantized else {}
        assign(layer, as_float(stored or read_layer(model, index)))
        states = [run_layer(model, index, hidden) for hidden in states]
        drop(layer)
    with outside_loaded(model, outside):
        return torch.cat([logits(model, hidden) for hidden in states])
