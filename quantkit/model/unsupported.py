# SPDX-License-Identifier: Apache-2.0
"""Kinds of models that cannot be quantized here, known from what a config.json says."""

from collections.abc import Iterator, Mapping
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


MOST = {"num_labels": 100_000, "num_hidden_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000, "num_layers": 10_000}


def unsupported(values: Mapping[str, Any]) -> str | None:
    """What a model is that keeps it from being quantized here: "is an encoder-decoder; ..."; None if nothing does."""
    if values.get("is_encoder_decoder"):
        return "is an encoder-decoder; only decoders are supported"
    return too_large(values)


def mixture(values: Mapping[str, Any]) -> str | None:
    """How a config says that its model is a mixture of experts: "num_experts=8"; None: it is not."""
    said = ((key, count) for key, count in _items(values) if key in EXPERTS and count not in (None, 0, 1, []))
    return next((f"{key}={count}" for key, count in said), None)


def too_large(values: Mapping[str, Any]) -> str | None:
    """What would fill the memory before a tensor is read: transformers lists all layers and all labels."""
    for key, count in _items(values):
        if isinstance(count, int) and count > MOST.get(key, 2**62):
            return f"says {key[:80]} {str(count)[:20]}; at most {MOST.get(key, 2**62):,} are read; the file is damaged"
    return None


def _items(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, also those one level down (some families keep them in `ffn_config` or `text_config`)."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict):
            yield from value.items()
