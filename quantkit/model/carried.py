# SPDX-License-Identifier: Apache-2.0
"""What a token carries through the layers beside its hidden state.

Some layers are called with more that depends on the tokens (Gemma 4's embeddings for each layer), or leave something
for later layers (its keys and values, which other layers share). Layers run one by one over all samples, so both are
kept for every token. They lie behind its hidden state, in one tensor: [batch, seqlen, hidden + width].
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Where = tuple[Any, ...]  # where a value is in a call: layer, "args" or "kwargs", and the keys within


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in what a token carries; begin: counted from the end of the hidden state.

    sizes: of the tensor without those of batch and sequence; dim: that of the sequence in it
    """

    begin: int
    sizes: tuple[int, ...]
    dim: int

    @property
    def width(self) -> int:
        return math.prod(self.sizes)

    def read(self, carried: Tensor) -> Tensor:
        part = carried[..., self.begin : self.begin + self.width]
        return part.reshape(*carried.shape[:2], *self.sizes).movedim(1, self.dim)

    def write(self, carried: Tensor, tensor: Tensor) -> None:
        """Put a tensor into its place, in place."""
        carried[..., self.begin : self.begin + self.width] = tensor.movedim(self.dim, 1).flatten(2)


@dataclass(frozen=True)
class Carried:
    """The places of all that tokens carry.

    moving: arguments that depend on the tokens; shared: what layers leave for later ones, by key
    """

    width: int = 0
    moving: Mapping[Where, Slot] = field(default_factory=dict)
    shared: Mapping[Any, tuple[Slot, ...]] = field(default_factory=dict)

    def opened(self, carried: Tensor) -> dict[Any, tuple[Tensor, ...]]:
        """What earlier layers have left; zeros where none has yet."""
        return {key: tuple(slot.read(carried) for slot in slots) for key, slots in self.shared.items()}

    def closed(self, carried: Tensor, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Tensor:
        """What the tokens carry after a layer; before, after: what layers share, before it ran and now."""
        changed = [key for key in self.shared if after[key] is not before[key]]
        if not changed:
            return carried
        carried = carried.clone()
        for key in changed:
            for slot, tensor in zip(self.shared[key], after[key], strict=True):
                slot.write(carried, tensor)
        return carried


def placed(moving: Mapping[Where, Tensor], shared: Mapping[Any, tuple[Tensor, ...]], seqlen: int) -> Carried:
    """Find a place for everything.

    Args:
        moving: arguments that depend on the tokens
        shared: what layers leave for later ones
        seqlen: a length by which the dimension of the sequence is known

    Raises:
        ValueError: a tensor that has not one such dimension, or that holds no floats.
    """
    begin = 0

    def slot_of(tensor: Tensor) -> Slot:
        nonlocal begin
        sizes = list(tensor.shape[1:])
        if not tensor.is_floating_point() or sizes.count(seqlen) != 1:
            raise ValueError("its layers are called with something that depends on the tokens")
        dim = sizes.index(seqlen) + 1
        slot = Slot(begin, tuple(sizes[: dim - 1] + sizes[dim:]), dim)
        begin += slot.width
        return slot

    places = {where: slot_of(tensor) for where, tensor in moving.items()}
    kept = {key: tuple(slot_of(tensor) for tensor in tensors) for key, tensors in shared.items()}
    return Carried(begin, places, kept)


def mapped(value: Any, change: Callable[[Where, Any], Any], where: Where = ()) -> Any:
    """A call, or a part of one, with every value in it changed; containers are made anew."""
    if isinstance(value, dict):
        return {key: mapped(item, change, (*where, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, change, (*where, number)) for number, item in enumerate(value))
    return change(where, value)


def is_store(value: Any) -> bool:
    """Whether a layer's argument is where layers leave something for later ones; none has yet."""
    return isinstance(value, MutableMapping) and not isinstance(value, dict) and not value


def filled(call: Any, carried: Tensor, shared: MutableMapping[Any, Any]) -> Any:
    """A recorded call with what the tokens carry in the places of its slots; shared: what layers leave."""

    def change(where: Where, value: Any) -> Any:
        if isinstance(value, Slot):
            return value.read(carried)
        return shared if is_store(value) else value

    return mapped(call, change)


def joined(hidden: Tensor, carried: Tensor) -> Tensor:
    """The state of the tokens: hidden states, and what they carry behind them."""
    return torch.cat([hidden, carried.to(hidden.dtype)], -1)
