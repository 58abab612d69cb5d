# SPDX-License-Identifier: Apache-2.0
"""Keys of config.json by which transformers 4 reads what transformers 5 keeps in `rope_parameters`.

transformers 4 knows no `rope_parameters`. Without keys of its own it takes defaults and computes other rotations,
without a word. Some things it cannot be told: scaling in nemotron, two bases in olmo3, the local base of modernbert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeKeys:
    """What a family of transformers 4 calls the parts of its rotary embedding; None: it has no such part.

    rope_type: how the scaling names its kind
    local_theta: the base of the layers with a sliding window, where it is not that of all layers
    only: the only other keys that the scaling may have; None: any
    """

    theta: str = "rope_theta"
    scaling: str | None = "rope_scaling"
    rope_type: str = "rope_type"
    partial: str | None = "partial_rotary_factor"
    local_theta: str | None = None
    only: tuple[str, ...] | None = None


USUAL = RopeKeys()
GEMMA3 = RopeKeys(local_theta="rope_local_base_freq")
NEOX = RopeKeys("rotary_emb_base", partial="rotary_pct")
OLMO = RopeKeys(rope_type="type")
ROPE_KEYS = {
    "gemma3_text": GEMMA3,
    "gemma3n_text": GEMMA3,
    "gpt_neox": NEOX,
    "gpt_neox_japanese": NEOX,
    "modernbert-decoder": RopeKeys("global_rope_theta", scaling=None, local_theta="local_rope_theta"),
    "olmo": OLMO,
    "olmo2": OLMO,
    "phi3": RopeKeys(rope_type="type", only=("short_factor", "long_factor")),
}


def older_rope_keys(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 that say the same.

    Args:
        kind: the model_type
        rope: the `rope_parameters`, for all layers or for each of "full_attention" and "sliding_attention"
    """
    keys = ROPE_KEYS.get(kind, USUAL)
    full, local = _of(rope, "full_attention"), _of(rope, "sliding_attention")
    said = {
        keys.theta: full.get("rope_theta"),
        keys.partial: full.get("partial_rotary_factor"),
        keys.local_theta: local.get("rope_theta"),
        keys.scaling: _scaling(keys, full),
    }
    return {key: value for key, value in said.items() if key is not None and value is not None}


def _scaling(keys: RopeKeys, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    apart = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    others = {key: value for key, value in rope.items() if key in (keys.only or rope.keys() - apart)}
    return None if rope_type == "default" else {keys.rope_type: rope_type, **others}


def _of(rope: Mapping[str, Any], layers: str) -> Mapping[str, Any]:
    """The parameters of one kind of layers."""
    nested = rope.get(layers)
    return nested if isinstance(nested, Mapping) else rope
