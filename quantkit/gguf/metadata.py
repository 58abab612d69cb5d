# SPDX-License-Identifier: Apache-2.0
"""What the metadata of a GGUF file says of its model: as a config to run it with, and in what the original differs.

llama.cpp computes with this metadata alone. What a file leaves out has llama.cpp's default.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from quantkit.errors import ModelError
from quantkit.gguf.architecture import ROPE_FACTORS, gguf_of, hyperparameters, rope_factors, rope_of
from quantkit.gguf.file import GGUFFile, Value
from quantkit.gguf.tokenizer import tokenizer_metadata
from quantkit.jsonfile import read_object
from quantkit.model.config_differences import difference, same_value
from quantkit.model.shapes import Shapes
from quantkit.model.skeleton import Architecture, build
from quantkit.model.streaming import StreamedModel

HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # hidden size over heads
SCALING = "rope.scaling."
NEUTRAL: Mapping[str, Any] = {  # ends of keys that change nothing with this value
    f"{SCALING}type": "none",
    f"{SCALING}factor": 1.0,
    f"{SCALING}attn_factor": 1.0,
    f"{SCALING}extrapolation_factor": 1.0,
    f"{SCALING}yarn_ext_factor": 1.0,
    f"{SCALING}yarn_attn_factor": 1.0,
    f"{SCALING}yarn_beta_fast": 32.0,
    f"{SCALING}yarn_beta_slow": 1.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}
PRE_NAMES = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # one name for equal ones
TOKENIZER = "tokenizer.ggml."
COMPARED = ("model", "pre", "bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
UNUSED = 5  # the type of a token that fills the vocabulary up


def own_model(file: GGUFFile, original: StreamedModel) -> Architecture:
    """The model that llama.cpp runs: the original, with what the file's metadata says in its place.

    Raises:
        ModelError: values that no model has.
    """
    if original.wrapped or not list(_hyperparameters(file, original)):
        return original
    return build(own_config(file, original), original.checkpoint)


def own_hyperparameters(file: GGUFFile, model: Shapes) -> dict[str, Any]:
    """The hyperparameters that llama.cpp reads, without the architecture's name before them."""
    prefix = f"{gguf_of(model).name}."
    keys = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    keys = {key: value[0] if _is_constant(value) else value for key, value in keys.items()}
    heads, width = keys.get("attention.head_count"), keys.get("embedding_length")
    usual: dict[str, Any] = {"rope.freq_base": 10000.0, "attention.head_count_kv": heads}
    if type(heads) is int and type(width) is int and heads > 0:
        usual |= dict.fromkeys(HEAD, width // heads)
    if "attention.key_length" in keys:
        usual["rope.dimension_count"] = keys["attention.key_length"]
    return usual | keys


def _is_constant(value: Any) -> bool:
    """Whether it is a list with a value for each layer, all alike."""
    return isinstance(value, list) and bool(value) and all(item == value[0] for item in value)


def own_config(file: GGUFFile, model: Shapes) -> PretrainedConfig:
    """The original's config with what the file says in its place.

    Raises:
        ModelError: values that no model has.
    """
    names, keys = gguf_of(model), own_hyperparameters(file, model)
    config: PretrainedConfig = copy.deepcopy(model.config)
    for key, attribute in names.keys.items():
        value, present = keys.get(key), getattr(config, attribute, None)
        if attribute == "rope_theta" or value is None or present is None or same_value(value, present):
            continue
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{file.path}: {names.name}.{key}: expected a positive number, got {value!r:.60}")
        setattr(config, attribute, value)
    _set_rope(config, keys, slowed=ROPE_FACTORS in file.infos)
    return config


def _set_rope(config: PretrainedConfig, keys: Mapping[str, Any], *, slowed: bool) -> None:
    """Give a config the rotary embedding that a file describes; slowed: by the factors of rope_type llama3."""
    rope = dict(rope_of(config)) | {"rope_theta": keys["rope.freq_base"]}
    kind = keys.get(f"{SCALING}type", "none")
    if kind in ("linear", "yarn") and keys.get(f"{SCALING}factor", 1.0) != 1.0:
        rope = {"rope_type": kind, "rope_theta": rope["rope_theta"], "factor": keys[f"{SCALING}factor"]} | {
            name: keys[key]
            for key, name in (
                (f"{SCALING}original_context_length", "original_max_position_embeddings"),
                (f"{SCALING}yarn_beta_fast", "beta_fast"),
                (f"{SCALING}yarn_beta_slow", "beta_slow"),
                (f"{SCALING}yarn_attn_factor", "attention_factor"),
            )
            if key in keys and kind == "yarn"
        }
    elif not (slowed and rope.get("rope_type") == "llama3"):
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if getattr(config, "rope_parameters", None):
        config.rope_parameters = rope
        return
    theta = rope.pop("rope_theta")
    config.rope_theta = theta
    config.rope_scaling = None if rope["rope_type"] == "default" else rope


def metadata_differences(file: GGUFFile, original: StreamedModel) -> list[str]:
    """One line for each value by which llama.cpp computes something else, or cuts text otherwise, than the original."""
    return [*_hyperparameters(file, original), *_factors(file, original), *_tokenizer(file, original)]


def _hyperparameters(file: GGUFFile, original: StreamedModel) -> Iterator[str]:
    prefix, keys = f"{gguf_of(original).name}.", own_hyperparameters(file, original)
    expected = {key.removeprefix(prefix): value for key, value in hyperparameters(original).items()}
    expected = {key: value for key, value in expected.items() if key in keys or key != "vocab_size"}
    for key, neutral in NEUTRAL.items():
        if key in keys or key in expected:
            expected.setdefault(key, neutral)
    for key, right in expected.items():
        value = keys.get(key, NEUTRAL.get(key))
        if key == "attention.sliding_window" and type(value) is int and value >= keys.get("context_length", 0):
            continue
        if key == f"{SCALING}type" and same_value(keys.get(f"{SCALING}factor", 1.0), 1.0) and right == "none":
            continue
        if not same_value(value, right):
            yield difference(f"{file.path.name}: {prefix}{key}", value, right)


def _factors(file: GGUFFile, original: StreamedModel) -> Iterator[str]:
    expected = rope_factors(original.config)
    value = file.read(ROPE_FACTORS) if ROPE_FACTORS in file.infos else None
    if (value is None) != (expected is None):
        there = "is missing, and the original has such" if value is None else "is there, and the original has none"
        yield f"{file.path.name}: {ROPE_FACTORS} {there}: factors that slow rotations down"
    elif value is not None and expected is not None and not _are_close(value, expected):
        yield f"{file.path.name}: {ROPE_FACTORS}: other factors than the original's slow rotations down"


def _are_close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-5)


def _tokenizer(file: GGUFFile, original: StreamedModel) -> Iterator[str]:
    raw = read_object(original.directory / "config.json", "expected the folder of a model")
    try:
        expected: Mapping[str, Value] = tokenizer_metadata(original.directory, original.config.vocab_size, raw)
    except ModelError:  # none, or a kind that is not written here: nothing is known to compare with
        return
    if f"{TOKENIZER}tokens" not in file.metadata:
        return
    for key in (f"{TOKENIZER}{name}" for name in COMPARED):
        value, right = file.metadata.get(key), expected.get(key)
        if isinstance(value, str) and isinstance(right, str):
            value, right = PRE_NAMES.get(value, value), PRE_NAMES.get(right, right)
        if value is not None and right is not None and value != right:
            yield difference(f"{file.path.name}: {key}", value, right)
    yield from _tokens(file, expected)
    key = f"{TOKENIZER}merges"
    if list(file.metadata.get(key) or []) != list(expected.get(key) or []):  # type: ignore[arg-type]
        yield f"{file.path.name}: {key}: other merges than the original's tokenizer has"
    templates = [str(each.get("tokenizer.chat_template") or "").strip() for each in (file.metadata, expected)]
    if all(templates) and templates[0] != templates[1]:
        yield f"{file.path.name}: the chat template is not that of the original"


def _tokens(file: GGUFFile, expected: Mapping[str, Any]) -> Iterator[str]:
    names, kinds = (f"{TOKENIZER}tokens", f"{TOKENIZER}token_type")
    tokens, right = list(file.metadata[names]), list(expected[names])
    types = list(file.metadata.get(kinds) or [1] * len(tokens))
    right_types = list(expected[kinds])
    if len(tokens) != len(right):
        yield f"{file.path.name}: {names}: {len(tokens)}, and {len(right)} in the original"
        return
    pairs = zip(tokens, types, right, right_types, strict=True)
    others = [
        index
        for index, (token, kind, token_there, kind_there) in enumerate(pairs)
        if (token, kind) != (token_there, kind_there) and (kind, kind_there) != (UNUSED, UNUSED)
    ]
    if others:
        first = others[0]
        yield (
            f"{file.path.name}: {names}: {len(others)} tokens are not the original's, the first of them {first}: "
            f"{tokens[first]!r:.40} of type {types[first]}, and {right[first]!r:.40} of type {right_types[first]}"
        )
