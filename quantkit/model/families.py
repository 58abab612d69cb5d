# SPDX-License-Identifier: Apache-2.0
"""An architecture is data: its sites, and the earlier op that each site's AWQ scale folds into.

A *site* is the set of linears in a decoder layer that read the same input. A family without a row here still works:
`streaming.discover_sites` finds its sites by watching one forward pass, and the folds into its norms by trying them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fold:
    """Where a scale of input channels can go: the producer's outputs are divided by it, what reads them multiplied.

    producer: a norm, or the linear whose outputs reach the readers channel by channel (v -> o through attention's
    averaging, up -> down through the gate's product)
    readers: every linear that reads these outputs, of one site or of several
    """

    producer: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Linears that read the very same input, in execution order, and so share a Gram matrix.

    fold: None when nothing can absorb a scale. Sites with the same fold share a scale, and need not share an input.
    """

    linears: tuple[str, ...]
    fold: Fold | None = None


def folded_site(producer: str, *linears: str) -> Site:
    """A site whose linears alone read what the producer returns."""
    return Site(linears, Fold(producer, linears))


LLAMA_LIKE = (
    folded_site("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    folded_site("self_attn.v_proj", "self_attn.o_proj"),
    folded_site("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"),
    folded_site("mlp.up_proj", "mlp.down_proj"),
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
