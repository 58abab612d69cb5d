# SPDX-License-Identifier: Apache-2.0
"""The KV cache of one sequence: what each layer keeps of a token, and the longest context that a given room holds.

It is exact: 2 (key and value) x key/value heads x head width x bytes, for each layer and token. A layer with a sliding
window stops growing at it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.model.family import evaluate
from quantkit.model.shapes import Shapes
from quantkit.serving.engines import heads_of
from quantkit.serving.stored import heads_on_card

KV_BYTES = {"fp16": 2, "fp8": 1}
FARTHEST = 2**30  # tokens; what fits this many has no limit


@dataclass(frozen=True)
class Cache:
    """Layers that keep keys and values alike: their number, bytes per token of one, and the window (None: none).

    A state that does not grow with the context, as of linear attention, is kept as a window of one token.
    """

    layers: int
    bytes_per_token: int
    window: int | None

    def bytes_at(self, context: int) -> int:
        return self.layers * self.bytes_per_token * (context if self.window is None else min(context, self.window))


def caches(model: Shapes, itemsize: int, cards: int) -> list[Cache]:
    """What layers keep of a sequence on one of `cards` cards, alike ones together."""
    family, config, count = model.family, model.config, len(model.layer_tensors)
    types = family.types(config, count)
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)  # the last ones use what earlier ones keep
    growing = [
        (_numbers_per_token(model, index, kind, cards) * itemsize if index < own else 0, window)
        for index, (kind, window) in enumerate(zip(types, _windows(config, count), strict=True))
    ]
    states = {kind: -(-evaluate(family.state(kind), config) // cards) for kind in set(types)}
    kept = [part for part in [*growing, *((states[kind], 1) for kind in types)] if part[0]]
    return [Cache(kept.count(alike), *alike) for alike in dict.fromkeys(kept)]


def _numbers_per_token(model: Shapes, index: int, kind: str, cards: int) -> int:
    """What a layer of this type keeps of each token on one card."""
    config = model.layer_config(index)
    here = heads_on_card(heads_of(config), cards)
    return int(evaluate(model.family.per_token(kind), config, num_key_value_heads=here))


def _windows(config: Any, layers: int) -> list[int | None]:
    """The sliding window of each layer, None where all of the context is kept."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [None] * layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = getattr(config, "max_window_layers", 0)  # older transformers: Qwen2's first layers see everything
    return [None if index < first else window for index in range(layers)]


def cache_bytes(parts: Sequence[Cache], context: int) -> int:
    return sum(cache.bytes_at(context) for cache in parts)


def bytes_per_token(parts: Sequence[Cache]) -> int:
    """What each further token takes, while no window is full."""
    return cache_bytes(parts, 2) - cache_bytes(parts, 1)


def longest_context(parts: Sequence[Cache], room: int) -> int | None:
    """The longest context whose cache takes at most `room` bytes; None if there is no limit."""
    longest = bisect_right(range(1, FARTHEST + 1), room, key=lambda context: cache_bytes(parts, context))
    return None if longest == FARTHEST else longest
