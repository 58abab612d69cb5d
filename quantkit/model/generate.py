# SPDX-License-Identifier: Apache-2.0
"""A whole model in memory, and the tokens that it writes one after the other.

Weights come from whoever reads them: as they are stored, or dequantized. So what runs is what quantkit measures, in
any format that it reads.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import ModelError, NumericsError
from quantkit.model.skeleton import Architecture
from quantkit.model.streaming import assign, move_buffers

Read = Callable[[list[str]], Mapping[str, Tensor]]  # full names -> tensors


def parameter_count(model: Architecture) -> int:
    """The numbers of a model's weights."""
    return sum(parameter.numel() for parameter in model.model.parameters())


def fill(
    model: Architecture, read: Read, device: torch.device, dtype: torch.dtype, layer_done: Callable[[int], None]
) -> PreTrainedModel:
    """Load every weight of a model that was built without any.

    Args:
        model: without weights
        read: gives tensors by their full names
        device: where they go
        dtype: what floats are cast to
        layer_done: is told the number of each finished layer

    Raises:
        ModelError: something has no weights afterwards.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    outside = read(list(model.outside()))
    assign(model.model, {model.names.others.get(name, name): cast(tensor) for name, tensor in outside.items()})
    head = model.model.get_output_embeddings()
    if model.tied and head is not None:
        head.weight = model.model.get_input_embeddings().weight
    for index, layer in enumerate(model.layers):
        prefix = model.layer_name(index)
        stored = read([f"{prefix}.{name}" for name in model.layer_shapes(index)])
        assign(layer, {name.removeprefix(f"{prefix}."): cast(tensor) for name, tensor in stored.items()})
        layer_done(index)
    move_buffers(model.model, device)
    missing = [name for name, parameter in model.decoder.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{missing[0]}: no weights; expected them for all of the text decoder")
    return model.model


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompt: Sequence[int], ends: Collection[int], pick: Callable[[Tensor], int]
) -> Iterator[int]:
    """The tokens that a model writes behind a prompt, without the one that ends them.

    Args:
        model: with its weights
        prompt: token ids
        ends: tokens that end an answer
        pick: logits of one position -> token

    Raises:
        NumericsError: logits that are not finite.
    """
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    ids, cache = torch.tensor([list(prompt)], device=device), None
    while True:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError("the model's logits are not finite; `quantkit verify` says where they stop being so")
        token = pick(logits)
        if token in ends:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def picker(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """How a token is chosen: the most likely at a temperature of 0, else drawn by a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        shares = torch.softmax(logits.cpu() / temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=generator))

    return pick
