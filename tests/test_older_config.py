# SPDX-License-Identifier: Apache-2.0
"""config.json as we write it: transformers 4 finds its own keys in it, and transformers 5 reads what it read before.

Which keys transformers 4 takes was found by running 46 families with rotary embeddings in 4.57.6 and 5.23.0 on the same
weights; what stands here is what made their logits equal.
"""

import copy
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.errors import ModelError
from quantkit.model.config import config_from_dict, with_older_keys
from quantkit.model.older import older_rope_keys

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 16}
NESTED = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 200.0}}
BOTH = {**LINEAR, **NESTED}
SCALED = {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        ("llama", DEFAULT, {"rope_theta": 5000.0}),
        ("llama", LINEAR, SCALED),
        ("nemotron", DEFAULT | {"partial_rotary_factor": 0.25}, {"rope_theta": 5000.0, "partial_rotary_factor": 0.25}),
        ("gpt_neox", LINEAR | {"partial_rotary_factor": 0.5}, {"rotary_emb_base": 5000.0, "rotary_pct": 0.5}),
        ("olmo2", LINEAR, {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        ("olmo3", NESTED, SCALED),
        ("olmo3", BOTH, SCALED),
        ("gemma3_text", NESTED, SCALED | {"rope_local_base_freq": 200.0}),
        ("modernbert-decoder", NESTED, {"global_rope_theta": 5000.0, "local_rope_theta": 200.0}),
        ("phi3", LONG, {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
        ("llama", {}, {}),
    ],
)
def test_the_keys_of_transformers_4(kind: str, rope: dict[str, Any], expected: dict[str, Any]) -> None:
    found = older_rope_keys(kind, rope)
    assert {key: found.get(key) for key in expected} == expected
    assert kind == "gpt_neox" or found == expected


def variants(kind: str) -> list[dict[str, Any]]:
    """Configs of a family as transformers 5 writes them, where it has rotary embeddings."""
    layers = getattr(CONFIG_MAPPING[kind](), "layer_types", None) or []
    ropes = [DEFAULT, LINEAR, DEFAULT | {"partial_rotary_factor": 0.25}, {"rope_type": "default"}]
    if "sliding_attention" in layers:
        ropes += [NESTED, BOTH]
    return [{"model_type": kind, "rope_parameters": copy.deepcopy(rope)} for rope in ropes]


ROTARY = [
    "llama",
    "qwen3",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "glm4",
    "nemotron",
    "stablelm",
    "gpt_neox",
    "persimmon",
    "modernbert-decoder",
]


@pytest.mark.parametrize("kind", ROTARY)
def test_transformers_5_reads_the_same_as_before(kind: str) -> None:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not hasattr(CONFIG_MAPPING[kind](), "rope_parameters"):
        pytest.skip("transformers 4, or a family that it does not know")
    for raw in variants(kind):
        try:
            before = config_from_dict(raw).rope_parameters
        except ModelError:  # phi3 takes no other type than longrope
            continue
        written = with_older_keys(raw)
        assert written.items() >= raw.items()
        assert len(written) > len(raw)
        after = config_from_dict(written).rope_parameters
        assert _without_type(after) == _without_type(before)


def _without_type(rope: dict[str, Any]) -> dict[str, Any]:
    """Without the older name of `rope_type`, which is kept beside it and not read."""
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    return nested or {key: value for key, value in rope.items() if key != "type"}


def test_what_transformers_4_wrote_stays_as_it_is() -> None:
    raw = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert with_older_keys(raw) == raw


def test_keys_that_contradict_are_those_that_the_run_used() -> None:
    raw = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": dict(LINEAR)}
    assert with_older_keys(raw) == raw | SCALED


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN"])
def test_numbers_that_json_has_no_name_for(text: str) -> None:
    """As transformers 5 writes them."""
    config = config_from_dict({"model_type": "llama", "rope_theta": 1e4, "attention_dropout": {"__float__": text}})
    assert str(config.attention_dropout) == str(float(text))
    with pytest.raises(ModelError, match="transformers does not accept"):
        config_from_dict({"model_type": "llama", "attention_dropout": {"__float__": "much"}})
