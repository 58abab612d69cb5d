# SPDX-License-Identifier: Apache-2.0
"""An architecture is data: its sites, and the earlier op that each site's AWQ scale folds into.

A *site* is the set of linears in a decoder layer that read the same input. A family without a row here still works:
`streaming.discover_sites` finds its sites by watching one forward pass, and the folds into its norms by trying them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """Linears that share an input, in execution order, and the module whose output channels can absorb a scale.

    producer: a norm, or the linear whose outputs reach these linears channel by channel (v -> o through attention's
    averaging, up -> down through the gate's product); None when nothing can absorb a scale.
    """

    linears: tuple[str, ...]
    producer: str | None = None


LLAMA_LIKE = (
    Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Site(("self_attn.o_proj",), "self_attn.v_proj"),
    Site(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Site(("mlp.down_proj",), "mlp.up_proj"),
)

FAMILIES: dict[str, tuple[Site, ...]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
}


def producer_channels(in_features: int, producer: nn.Module, head_dim: int) -> Tensor | None:
    """Which output channel of the producer feeds each input column, int64 [in_features]; None if that is unknown.

    With grouped-query attention one value head serves several query heads, so their columns share its channels.
    """
    weight = producer.weight
    assert isinstance(weight, Tensor)
    channels = weight.shape[0]
    if channels == in_features:
        return torch.arange(in_features)
    if not isinstance(producer, nn.Linear) or in_features % channels or channels % head_dim:
        return None
    heads, repeats = channels // head_dim, in_features // channels
    return torch.arange(channels).view(heads, 1, head_dim).expand(heads, repeats, head_dim).reshape(-1)
