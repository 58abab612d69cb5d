# SPDX-License-Identifier: Apache-2.0
"""config.json, read once and refused at the door if the model is of a kind that cannot be quantized here."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.errors import ModelError


def load_config(directory: Path) -> PretrainedConfig:
    """Read config.json and refuse, by name, what cannot be quantized here.

    Raises:
        ModelError: no config.json, no or unknown model_type, a mixture of experts, an encoder-decoder, a model with a
            vision or audio tower, or one that is quantized already.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: no config.json; expected a Hugging Face model directory")
    try:
        raw, _ = PretrainedConfig.get_config_dict(str(directory))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0][:120]})") from error
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{path}: no model_type; expected the architecture's name, for example qwen2")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise ModelError(f"{directory}: already quantized ({method}); expected the 16-bit model it was made from")
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{directory}: {kind} is an encoder-decoder; only decoders are supported")
    for tower in ("vision_config", "audio_config"):
        if raw.get(tower):
            raise ModelError(
                f"{directory}: {kind} has a {tower.removesuffix('_config')} tower; only text decoders are supported"
            )
    experts = [
        key for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if raw.get(key)
    ]
    if experts:
        raise ModelError(
            f"{directory}: {kind} is a mixture of experts ({experts[0]}={raw[experts[0]]}); only dense decoders are supported"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{path}: model_type {kind!r} is not a causal language model that this transformers knows; update transformers?"
        )
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{path}: transformers does not accept it ({str(error).splitlines()[0][:200]})") from error
    assert isinstance(config, PretrainedConfig)
    return config
