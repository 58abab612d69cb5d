# SPDX-License-Identifier: Apache-2.0
"""How numbers are represented: the only place where codes become floats and floats become codes.

A weight W [out_features, in_features] is cut into groups of `group_size` consecutive input columns. Each row of
each group has one float16 scale s and one integer zero point z, and a weight is stored as the unsigned code q:

    w = (q - z) * s          0 <= q <= 2**bits - 1

Symmetric schemes fix z = 2**(bits - 1). Their scales may be negative: the code range is one longer below zero than
above it, and a negative scale puts the longer side where the larger weight is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError

if TYPE_CHECKING:  # sizes are planned before torch is needed
    import torch
    from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """Bits, group size (-1: one group for the whole row), and whether the zero point is fixed in the middle."""

    bits: int
    group_size: int
    symmetric: bool

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
            raise SchemeError(f"in_features {in_features} is not divisible by group_size {self.group_size}; {hint}")
        return in_features // columns

    def __str__(self) -> str:
        group = "rows" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight in natural order: the only currency between methods and formats.

    codes:  uint8 [out_features, in_features], each in 0 .. 2**bits - 1
    scales: float16 [out_features, groups]
    zeros:  uint8 [out_features, groups], each in 0 .. 2**bits - 1; 2**(bits - 1) everywhere when symmetric
    g_idx:  int32 [in_features], the group of each column, or None when column k is in group k // group_size
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]


def split_rows(quantized: QuantizedTensor, rows: Sequence[int]) -> list[QuantizedTensor]:
    """Cut a tensor into tensors of so many rows each, in order."""
    parts = (x.split(list(rows)) for x in (quantized.codes, quantized.scales, quantized.zeros))
    return [replace(quantized, codes=c, scales=s, zeros=z) for c, s, z in zip(*parts, strict=True)]


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The tensor that `split_rows` cuts into these."""
    import torch

    codes, scales, zeros = (torch.cat(x) for x in zip(*((q.codes, q.scales, q.zeros) for q in parts), strict=True))
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros)


def expand(per_group: Tensor, columns: int) -> Tensor:
    """[out, groups] -> [out, groups * columns], each value repeated over the columns of its group."""
    return per_group.repeat_interleave(columns, dim=1)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Round each weight [out, in] to the nearest code (uint8 [out, in]) on the given grid [out, groups]."""
    columns = weight.shape[1] // scales.shape[1]
    grouped = weight.float().unflatten(1, (-1, columns))  # [out, groups, columns]
    codes: Tensor = (grouped / scales.float().unsqueeze(2)).round_() + zeros.float().unsqueeze(2)
    return codes.clamp_(0, scheme.max_code).flatten(1).byte()


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] that the codes stand for: (q - z) * s, computed in float32; dtype None keeps that."""
    if quantized.g_idx is not None:
        group = quantized.g_idx.long()
        scales, zeros = quantized.scales.float()[:, group], quantized.zeros.float()[:, group]
        return ((quantized.codes.float() - zeros) * scales).to(dtype or scales.dtype)
    columns = quantized.in_features // quantized.scales.shape[1]
    codes: Tensor = quantized.codes.float().unflatten(1, (-1, columns))
    weight = (codes - quantized.zeros.float().unsqueeze(2)) * quantized.scales.float().unsqueeze(2)
    return weight.flatten(1).to(dtype or weight.dtype)


@dataclass(frozen=True)
class Superblocks:
    """A weight with two levels of scales, as llama.cpp's K-quants have them; superblocks of 256 input columns.

        w = d * scale * (code - zero) - dmin * low

    codes:  uint8 [out_features, in_features]
    scales: int16 [out_features, in_features / columns], whole numbers; lows: the same, all 0 when nothing is subtracted
    d:      float16 [out_features, in_features / 256]; dmin: the same
    zero:   what is taken off every code
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor
    d: Tensor
    dmin: Tensor
    zero: int


def two_levels(blocks: Superblocks) -> tuple[Tensor, Tensor]:
    """Each group's step and what is subtracted, float32 [out, groups]: the two levels of scales multiplied out."""
    groups = blocks.scales.shape[1] // blocks.d.shape[1]
    step = expand(blocks.d.float(), groups) * blocks.scales.float()
    return step, expand(blocks.dmin.float(), groups) * blocks.lows.float()


def dequantize_superblocks(blocks: Superblocks) -> Tensor:
    """The weight float32 [out, in] that superblocks stand for."""
    step, low = two_levels(blocks)
    columns = blocks.codes.shape[1] // step.shape[1]
    return (blocks.codes.float() - blocks.zero) * expand(step, columns) - expand(low, columns)
