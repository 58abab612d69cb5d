# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: every expert a module of three ordinary linears, as checkpoints name them.

transformers holds all experts of a layer in two stacked parameters. Here each such module is replaced by one with a
linear for each matrix, so that plans, formats and methods see what they know. It computes the same.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint, Entry, Part
from quantkit.errors import ModelError

ROWS = 32  # that a CPU multiplies of an expert's tokens at least: oneDNN keeps memory for every count that it meets


class Bare(nn.Linear):
    """A linear that is not filled with random numbers first: there are thousands of them."""

    def reset_parameters(self) -> None:
        """Nothing: it is filled from a file."""


class Expert(nn.Module):
    """One expert: gate and up, their product as the architecture makes it, and down."""

    def __init__(
        self, sizes: tuple[int, int], bias: bool, names: tuple[str, str, str], combine: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        hidden, inner = sizes
        self.names, self.combine = names, combine
        for name, (rows, columns) in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            self.add_module(name, Bare(columns, rows, bias=bias, device="meta"))

    def forward(self, hidden: Tensor, *, whole: bool = True) -> Tensor:
        """What it makes of tokens [n, hidden]; not whole: only what down reads."""
        gate, up, down = map(self.get_submodule, self.names)
        rows = len(hidden)
        if hidden.device.type == "cpu":
            hidden = nn.functional.pad(hidden, (0, 0, 0, -rows % ROWS))
        between = self.combine(gate(hidden), up(hidden))
        return cast(Tensor, down(between) if whole else between)[:rows]


class Experts(nn.ModuleList):
    """The experts of a layer, called as transformers calls its stacked ones.

    names: of gate, up and down; apart: whether files that stack them have gate and up in turn, and rows as columns;
    scales_through: whether down reads twice as much where up returns twice as much
    """

    def __init__(self, experts: Iterable[Expert], names: tuple[str, str, str], apart: bool) -> None:
        super().__init__(experts)
        self.names, self.apart = names, apart
        self.scales_through = _scales_through(cast(Expert, self[0]).combine)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [n, hidden], and for each the numbers and the weights [n, k] of its experts -> [n, hidden]."""
        total = torch.zeros_like(hidden_states)
        if hidden_states.is_meta:
            return total
        for number, (token, place) in enumerate(by_expert(top_k_index, len(self))):
            if len(token):
                output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


def by_expert(top_k_index: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """For each expert the tokens that are routed to it, in order, and which of a token's choices it is.

    A number behind the last expert stands for none.
    """
    flat = top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    choices = top_k_index.shape[-1]
    return [(part // choices, part % choices) for part in order[: sum(counts)].split(counts)]


def unstack_experts(layer: nn.Module, names: tuple[str, str, str]) -> None:
    """Replace the stacked experts within a layer, in place; names: of gate, up and down.

    Raises:
        ModelError: experts of a kind that is not known here.
    """
    for name, module in list(layer.named_modules()):
        if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, _unstacked(name, module, names))


def _unstacked(name: str, module: Any, names: tuple[str, str, str]) -> Experts:
    odd = {
        "a norm behind each": getattr(module, "has_post_expert_norm", False),
        "weights in an order that is not known": module.is_transposed == module.is_concatenated,
        "no gate": not module.has_gate,
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise ModelError(f"{name}: experts with {' and '.join(found)}, which cannot be quantized here yet")
    apart = module.is_transposed
    experts, *sizes = module.down_proj.shape
    inner, hidden = sizes if apart else reversed(sizes)

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack([gate, up], -1).flatten(-2) if apart else torch.cat([gate, up], -1)
        return cast(Tensor, module._apply_gate(both))

    return Experts((Expert((hidden, inner), module.has_bias, names, combine) for _ in range(experts)), names, apart)


def _scales_through(combine: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether what is made of gate and up is twice as much where up is, also for large numbers."""
    gate, up = 16 * torch.linspace(-1, 1, 64).unsqueeze(1), 16 * torch.linspace(-1, 1, 64)
    gate, up = (each.contiguous() for each in torch.broadcast_tensors(gate, up))
    return torch.equal(combine(gate, 2 * up), 2 * combine(gate, up))


def experts_of(layer: nn.Module) -> dict[str, Experts]:
    """The mixtures within a layer, by their names in it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, Experts)}


# ---------------------------------------------------------------- stacked in the file


def unstacked(checkpoint: Checkpoint, blocks: Mapping[str, Experts], stacked: tuple[str, str]) -> Checkpoint:
    """The checkpoint with each expert of a stacked tensor as a tensor of its own: a part of the same bytes.

    blocks: the mixtures by their full names; stacked: see `Family`

    Raises:
        ModelError: a stacked tensor of another shape.
    """
    entries = dict(checkpoint.entries)
    for block, experts in blocks.items():
        parent = block.rpartition(".")[0]
        for stack, leaves in zip(stacked, (experts.names[:2], experts.names[2:]), strict=True):
            rows, columns = experts.get_parameter(f"0.{leaves[0]}.weight").shape
            rows *= len(leaves)
            matrix = (columns, rows) if experts.apart else (rows, columns)
            for kind, name, shape in (
                ("weight", f"{parent}.{stack}", matrix),
                ("bias", f"{parent}.{stack}_bias", (rows,)),
            ):
                entry = entries.pop(name, None)
                if entry is not None:
                    if entry.shape != (len(experts), *shape):
                        raise ModelError(
                            f"{checkpoint.directory}: tensor {name} has shape {list(entry.shape)}, config.json asks "
                            f"for {[len(experts), *shape]}"
                        )
                    cut = _columns if experts.apart else _rows
                    parts = cut(entry, [f"{leaf}.{kind}" for leaf in leaves])
                    entries |= {f"{block}.{leaf}": part for leaf, part in parts.items()}
    return replace(checkpoint, entries=entries)


def _columns(entry: Entry, names: list[str]) -> dict[str, Entry]:
    """The parts of a stacked tensor [experts, ..., columns] by "number.name", which take turns column by column; they
    are rows then.
    """
    experts, *shape = entry.shape
    nbytes, found = entry.nbytes // experts, {}
    for number in range(experts):
        whole = replace(entry, shape=tuple(shape), nbytes=nbytes, offset=entry.offset + number * nbytes)
        for first, name in enumerate(names):
            part = Part(whole, first, len(names), transposed=True)
            sizes = (shape[-1] // len(names), *shape[:-1])
            found[f"{number}.{name}"] = replace(whole, shape=sizes, nbytes=nbytes // len(names), part=part)
    return found


def _rows(entry: Entry, names: list[str]) -> dict[str, Entry]:
    """The parts of a stacked tensor [experts, rows, ...] by "number.name": equally many rows each, one after the
    other.
    """
    experts, rows, *columns = entry.shape
    shape, nbytes = (rows // len(names), *columns), entry.nbytes // (experts * len(names))
    order = [f"{number}.{name}" for number in range(experts) for name in names]
    return {
        name: replace(entry, shape=shape, nbytes=nbytes, offset=entry.offset + place * nbytes)
        for place, name in enumerate(order)
    }
