# SPDX-License-Identifier: Apache-2.0
"""In which values of two configs a model computes something else, or stops its answers elsewhere.

Compared are configs that transformers has read, so that defaults may be left out and spelled in any way that it knows.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from quantkit.model.config import text_config
from quantkit.model.older import older_rope_keys
from quantkit.model.shapes import text_values

# Keys of every config that the tokens of an answer depend on. All others that are of every config change no number.
COMMON = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
UNUSED = {  # keys that only training, caches or older transformers read
    "initializer_range",
    "initializer_factor",
    "use_cache",
    "pretraining_tp",
    "pad_token_id",
    "output_router_logits",
    "router_aux_loss_coef",
    "quantization_config",
}
UNUSED_PARTS = ("dropout", "pdrop")
ROPE = "rope_parameters"
OLDER_ROPE = {"rope_theta", "rope_scaling"}  # which transformers 5 has read into ROPE
ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_type": "default"}
SPELLINGS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # equal functions
CLOSE = 1e-6  # relative: a float32 is no difference


def config_differences(config: PretrainedConfig, original: PretrainedConfig) -> list[str]:
    """One line for each value by which a model computes something else than the original."""
    values, expected = (dict(_values(each)) for each in (config, original))
    return [
        difference(f"config.json: {key}", values[key], expected[key])
        for key in expected
        if key in values and not same_value(values[key], expected[key])
    ]


def contradictions(raw: Mapping[str, Any], config: PretrainedConfig) -> list[str]:
    """One line for each key by which transformers 4 reads another rotary embedding from a file than transformers 5.

    raw: the file's content; config: what transformers 5 has read from it
    """
    text, values = text_config(config), text_values(raw)
    older = older_rope_keys(text.model_type, getattr(text, ROPE, None) or {})
    return [
        f"config.json: {key} is {values[key]!r:.60}, and its {ROPE} come to {value!r:.60}: readers differ on it"
        for key, value in older.items()
        if isinstance(value, float | int) and values.get(key) is not None and not same_value(values[key], value)
    ]


def difference(name: str, value: Any, expected: Any) -> str:
    """The line that says so."""
    return f"{name} is {value!r:.60}, and {expected!r:.60} in the original: it is not the same model"


def same_value(value: Any, expected: Any) -> bool:
    """Whether two values of configs mean the same."""
    if isinstance(value, float | int) and isinstance(expected, float | int):
        return math.isclose(value, expected, rel_tol=CLOSE) or value == expected
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, str) and isinstance(expected, str):
        return SPELLINGS.get(value, value) == SPELLINGS.get(expected, expected)
    return bool(value == expected)


def _values(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """What a model computes with, by dotted keys."""
    yield from _plain("", config.to_dict(), set(PretrainedConfig().to_dict()) - set(COMMON))


def _plain(prefix: str, values: Mapping[str, Any], common: set[str]) -> Iterator[tuple[str, Any]]:
    older = OLDER_ROPE if values.get(ROPE) else set()
    windows = {"max_window_layers"} if not values.get("sliding_window") else set()
    for key, value in values.items():
        if key in common | UNUSED | older | windows or any(part in key for part in UNUSED_PARTS):
            continue
        if key in (ROPE, "rope_scaling") and isinstance(value, Mapping):
            yield from _rope(f"{prefix}{key}.", value)
        elif isinstance(value, Mapping) and key.endswith("_config"):
            yield from _plain(f"{prefix}{key}.", value, common)
        elif key in ("bos_token_id", "eos_token_id"):
            if value is not None:  # else the tokenizer says it
                yield f"{prefix}{key}", sorted(value) if isinstance(value, list) else [value]
        else:
            yield f"{prefix}{key}", value


def _rope(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rotary parameters, for all layers or for kinds of layers; what is left out has its default."""
    nested = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, value in nested.items():
        yield from _rope(f"{prefix}{key}.", value)
    if not nested:
        plain = {key: value for key, value in values.items() if value is not None and key != "type"}
        if "rope_type" not in plain and "type" in values:
            plain["rope_type"] = values["type"]
        names = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", *ROPE_DEFAULTS, *plain}
        yield from ((f"{prefix}{name}", plain.get(name, ROPE_DEFAULTS.get(name))) for name in sorted(names))
