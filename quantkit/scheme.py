# SPDX-License-Identifier: Apache-2.0
"""What a scheme is, and the quantized tensor that passes between methods and formats. Imports no torch by itself.

A weight W [out_features, in_features] is cut into groups of `group_size` consecutive input columns. Each row of each
group has a scale, and each weight is stored as a code. What codes stand for is the grid's to say (`grids`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError

if TYPE_CHECKING:  # sizes are planned before torch is needed
    from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """Bits, group size (-1: one group for the whole row), whether the zero point is fixed, and the grid's name."""

    bits: int
    group_size: int
    symmetric: bool
    grid: str = "integer"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"bits: expected {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise SchemeError(f"group_size: expected a positive number or -1 (whole rows), got {self.group_size}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """The number of groups in a row.

        Raises:
            SchemeError: the group size does not divide in_features.
        """
        columns = self.columns_per_group(in_features)
        if in_features % columns:
            fitting = [g for g in (256, 128, 64, 32) if in_features % g == 0 and g < columns]
            hint = f"use {' or '.join(map(str, fitting[:2]))}" if fitting else "use -1 (whole rows)"
            hint += ", or --group auto"
            raise SchemeError(f"in_features {in_features} is not divisible by group_size {self.group_size}; {hint}")
        return in_features // columns

    def __str__(self) -> str:
        if self.grid != "integer":
            return self.grid.upper()
        group = "rows" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


def name_of(scheme: Scheme | None) -> str:
    """What a linear's numbers are called; None: 16 bit."""
    return "16 bit" if scheme is None else str(scheme)


# Schemes that have a name of their own.
NAMED = {
    "q4_0": Scheme(4, 32, True),
    "q4_1": Scheme(4, 32, False),
    "q8_0": Scheme(8, 32, True),
    "q4_k": Scheme(4, 32, False, "q4_k"),
    "q5_k": Scheme(5, 32, False, "q5_k"),
    "q6_k": Scheme(6, 16, True, "q6_k"),
}


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight in natural order: the only currency between methods and formats.

    codes:  uint8 [out_features, in_features]
    scales: [out_features, groups]; of integer grids float16
    zeros:  [out_features, groups]; of integer grids uint8, 2**(bits - 1) everywhere when symmetric
    g_idx:  int32 [in_features], the group of each column, or None when column k is in group k // group_size
    outer:  the second level of scales of grids that have one, by name: [out_features, columns of its own]
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None
    outer: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]


def split_rows(quantized: QuantizedTensor, rows: Sequence[int]) -> list[QuantizedTensor]:
    """Cut a tensor into tensors of so many rows each, in order."""
    parts = {name: tensor.split(list(rows)) for name, tensor in _by_row(quantized).items()}
    return [_from_rows(quantized, {name: part[i] for name, part in parts.items()}) for i in range(len(rows))]


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The tensor that `split_rows` cuts into these."""
    import torch

    tensors = [_by_row(part) for part in parts]
    return _from_rows(parts[0], {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})


def map_rows(quantized: QuantizedTensor, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """The tensor with each of its parts, whose rows are output features, changed alike."""
    return _from_rows(quantized, {name: change(tensor) for name, tensor in _by_row(quantized).items()})


def _by_row(quantized: QuantizedTensor) -> dict[str, Tensor]:
    return {"codes": quantized.codes, "scales": quantized.scales, "zeros": quantized.zeros, **quantized.outer}


def _from_rows(like: QuantizedTensor, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    outer = {name: tensors[name] for name in like.outer}
    return replace(like, codes=tensors["codes"], scales=tensors["scales"], zeros=tensors["zeros"], outer=outer)


def expand(per_group: Tensor, columns: int) -> Tensor:
    """[out, groups] -> [out, groups * columns], each value repeated over the columns of its group."""
    return per_group.repeat_interleave(columns, dim=1)
