# SPDX-License-Identifier: Apache-2.0
"""config.json, read once and refused at the door if the model is of a kind that cannot be quantized here."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.checkpoint.original import stands_for_floats
from quantkit.checkpoint.reader import ADAPTER_CONFIG, Checkpoint, adapter_error, open_checkpoint
from quantkit.errors import ModelError
from quantkit.jsonfile import read_object
from quantkit.model.older import older_rope_keys
from quantkit.model.shapes import text_values
from quantkit.model.unsupported import too_large, unsupported

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)

# Models around a text decoder. transformers 5 has one class for all of them, 4 one for those that see.
WRAPPERS, WRAPPER_CLASS = next(
    (getattr(modeling_auto, names), getattr(modeling_auto, each))
    for names, each in (
        ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM"),
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    )
    if hasattr(modeling_auto, names)
)
QUANTIZED = ("quantization_config", "compression_config")  # where a config says how its weights are stored
OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False}


def load_config(directory: Path, headers: Checkpoint | None = None) -> PretrainedConfig:
    """Read config.json and refuse, by name, what cannot be quantized here.

    headers: the model's tensors, where its weights are not in the folder

    Raises:
        ModelError: no config.json, no or unknown model_type, a mixture of experts, an encoder-decoder, a model that is
            quantized already, or sizes that cannot be.
    """
    path = directory / "config.json"
    if not path.exists() and (directory / ADAPTER_CONFIG).exists():
        raise adapter_error(directory)
    raw = read_object(path, "expected the folder of a Hugging Face model")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{path}: no model_type; expected the architecture's name, for example qwen2")
    _refuse_kinds(directory, kind, raw)
    if reason := unknown(kind, raw):
        raise ModelError(f"{path}: {reason}")
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        complete = config.to_dict()
        text = text_config(config)
    except Exception as error:  # transformers checks values in many ways, and raises whatever comes
        raise ModelError(f"{path}: transformers does not accept it ({one_line(error)})") from error
    assert isinstance(config, PretrainedConfig)
    said = text_values(raw)
    if int(transformers.__version__.partition(".")[0]) < 5 and isinstance(rope := said.get("rope_parameters"), dict):
        unread = [key for key in older_rope_keys(text.model_type, rope) if said.get(key) is None]
        if unread:
            raise ModelError(
                f"{path}: says rope_parameters, which this transformers does not read, and no {unread[0]}; "
                f"use transformers 5, or add {', '.join(unread)} to it"
            )
    config = _computing(config)
    if (tied := unsaid_tie(directory, raw, headers)) is not None:
        config.tie_word_embeddings = tied
    _refuse_kinds(directory, kind, complete)  # what config.json leaves out has its default
    _check_sizes(path, text)
    return config


def unsaid_tie(directory: Path, raw: Mapping[str, Any], headers: Checkpoint | None = None) -> bool | None:
    """Whether the head of a model with a tower is the embedding, where config.json's content does not say so itself.

    None: it does, or there is no tower. The defaults of transformers' classes are not those of the text decoders, so it
    is told by the decoder's part of config.json, and then by whether a head is stored.
    """
    said = text_values(raw)
    if said is raw or "tie_word_embeddings" in raw:
        return None
    if "tie_word_embeddings" in said:
        return bool(said["tie_word_embeddings"])
    try:
        stored = open_checkpoint(directory) if headers is None else headers
        return not any(name.endswith("lm_head.weight") for name in stored.entries)
    except ModelError:  # a config alone
        return None


def config_from_dict(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a config.json's content, or of a recipe's `config`; how it is quantized is ignored.

    Raises:
        ModelError: no model_type, not a causal language model, or values that transformers does not accept.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"config: model_type: expected a causal language model such as qwen2, got {kind!r}")
    if reason := unknown(kind, raw) or too_large(raw):
        raise ModelError(f"config: {reason}")
    try:
        values = {key: _floats(value) for key, value in raw.items() if key not in ("model_type", *QUANTIZED)}
        config = AutoConfig.for_model(kind, **values)
        text_config(config)
    except Exception as error:  # transformers checks values in many ways, and raises whatever comes
        raise ModelError(f"config: transformers does not accept it ({one_line(error)})") from error
    assert isinstance(config, PretrainedConfig)
    return _computing(config)


def scales_config(directory: Path) -> dict[str, Any]:
    """What config.json says of weights with scales beside them; empty if it says nothing."""
    raw = read_object(directory / "config.json", "expected the folder of a Hugging Face model")
    return next((dict(raw[key]) for key in QUANTIZED if isinstance(raw.get(key), dict)), {})


def unknown(kind: str, raw: Mapping[str, Any]) -> str | None:
    """Why transformers cannot build a decoder of a model_type; None: it can."""
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in WRAPPERS:
        return None
    if kind in CONFIG_MAPPING:
        return f"model_type {kind!r} is not a causal language model; transformers knows it as a model of another kind"
    if raw.get("auto_map"):
        return f"model_type {kind[:80]!r} is code that comes with the model (auto_map), and such code is never run"
    return (
        f"model_type {kind[:80]!r} is not a causal language model that transformers {transformers.__version__} knows; "
        "update transformers?"
    )


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds the model of a config."""
    if text_config(config) is config or config.model_type not in WRAPPERS:
        return AutoModelForCausalLM
    return WRAPPER_CLASS


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text decoder: a part of a config that describes a vision or audio tower as well."""
    found = config.get_text_config(decoder=True)
    assert isinstance(found, PretrainedConfig)
    return found


def _computing(config: PretrainedConfig) -> PretrainedConfig:
    """The config with the outputs that every model is run for here: those that a file asks for change no weight.

    Where layers differ in their numbers, what is said of all can be read, too; `Shapes.layer_config` knows each.
    """
    for each in (config, text_config(config)):
        each.allow_global_per_layer_attribute_access = True
        for key, value in OUTPUTS.items():
            setattr(each, key, value)
        for key in QUANTIZED:  # what is read from the files are the numbers themselves
            vars(each).pop(key, None)
    return config


def with_older_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content that transformers 4 and 5 read alike, where both can; one without `rope_parameters` stays
    as it is.

    Raises:
        ModelError: see `config_from_dict`.
    """
    said = text_values(raw)
    if not isinstance(said.get("rope_parameters"), Mapping):
        return dict(raw)
    # With the defaults of transformers 5 in it. transformers 4 keeps there what the file says.
    text = text_config(config_from_dict(raw))
    older = older_rope_keys(text.model_type, getattr(text, "rope_parameters", None) or {})
    both = {**older, **said, **older}
    made = both if said is raw else {**raw, "text_config": both}
    try:
        config_from_dict(made)
    except ModelError:  # a family that transformers 4 does not have, and that has no such keys
        return dict(raw)
    return made


def with_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json's content that says a dtype, also in its parts that say one."""
    keys = ("dtype", "torch_dtype")
    parts = {
        name: {key: dtype if key in keys and value else value for key, value in part.items()}
        for name, part in raw.items()
        if name.endswith("_config") and isinstance(part, Mapping)
    }
    return {key: value for key, value in raw.items() if key != "dtype"} | parts | {"torch_dtype": dtype}


def _floats(value: Any) -> Any:
    """A copy in which infinities and NaN, which transformers 5 writes as {"__float__": "Infinity"}, are numbers."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _floats(v) for k, v in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def one_line(error: Exception) -> str:
    """The message of another library's error, cut to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_kinds(directory: Path, kind: str, values: Mapping[str, Any]) -> None:
    for key in QUANTIZED:
        if (settings := values.get(key)) and not (isinstance(settings, dict) and stands_for_floats(settings)):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise ModelError(
                f"{directory}: already quantized ({method or 'an unknown method'}); "
                "expected the 16-bit model it was made from"
            )
    if reason := unsupported(values):
        raise ModelError(f"{directory}: {kind} {reason}")


def _check_sizes(path: Path, config: PretrainedConfig) -> None:
    sizes = {key: value for key in SIZES if (value := getattr(config, key, None)) is not None}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path}: {key}: expected a positive number, got {value!r}")
    hidden, heads, kv_heads = (sizes.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden and heads and hidden % heads and getattr(config, "head_dim", None) is None:
        raise ModelError(f"{path}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads and kv_heads and heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
