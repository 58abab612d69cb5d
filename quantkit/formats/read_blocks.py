# SPDX-License-Identifier: Apache-2.0
"""Blocks of llama.cpp's types that are read and not written (https://github.com/ggml-org/llama.cpp, ggml-common.h).

bf16     2 bytes for   1 weight:  the upper half of a float32
q5_0    22 bytes for  32 weights: d, fifth bits, the lower four                              w = d (q - 16)
q5_1    24 bytes for  32:         d, m, the same                                             w = d q + m
q2_k    84 bytes for 256:         16 scales and lows of 4 bits, codes, d, dmin               w = d s q - dmin l
q3_k   110 bytes for 256:         third bits, the lower two, 16 scales of 6 bits, d          w = d (s - 32) (q - 4)
iq4_nl  18 bytes for  32:         d, codes of a table                                        w = d t[q]
iq4_xs 136 bytes for 256:         d, 8 scales of 6 bits, codes of the table                  w = d (s - 32) t[q]
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# The 16 values of iq4_nl and iq4_xs.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def halffloats(raw: Tensor) -> Tensor:
    """uint8 [..., 2] -> float32 [..., 1]."""
    return raw.contiguous().view(torch.float16).float()


def _halves(packed: Tensor) -> Tensor:
    """Bytes [..., n] -> codes [..., 2 n]: the lower four bits first, then the upper four."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _shifted(packed: Tensor, shifts: range) -> Tensor:
    """Bytes [..., n] -> [..., len(shifts), n]: the bytes moved right by each."""
    return torch.stack([packed >> shift for shift in shifts], -2)


def _fifth(raw: Tensor) -> Tensor:
    """Four bytes of bits [..., 4] -> [..., 32], each 0 or 16."""
    bits = raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=raw.device) & 1
    return bits.flatten(-2) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = blocks.split([2, 4, 16], -1)
    return halffloats(d) * ((_halves(low) | _fifth(high)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = blocks.split([2, 2, 4, 16], -1)
    return halffloats(d) * (_halves(low) | _fifth(high)).float() + halffloats(m)


def _two_bits(packed: Tensor) -> Tensor:
    """64 bytes -> 256 codes of 2 bits, [..., 16 groups, 16]: each 32 bytes hold four times 32 columns."""
    halves = packed.unflatten(-1, (2, 32))
    values: Tensor = (_shifted(halves, range(0, 8, 2)) & 3).flatten(-3).unflatten(-1, (16, 16))
    return values


def _q2_k(blocks: Tensor) -> Tensor:
    scales, codes, d, dmin = blocks.split([16, 64, 2, 2], -1)
    step = halffloats(d) * (scales & 15).float()
    low = halffloats(dmin) * (scales >> 4).float()
    values: Tensor = (step.unsqueeze(-1) * _two_bits(codes).float() - low.unsqueeze(-1)).flatten(-2)
    return values


def _q3_k(blocks: Tensor) -> Tensor:
    third, low, packed, d = blocks.split([32, 64, 12, 2], -1)
    lower, upper = packed.split([8, 4], -1)
    scales = _halves(lower) | (_shifted(upper, range(0, 8, 2)) & 3).flatten(-2) << 4
    high = (_shifted(third, range(8)) & 1).flatten(-2).unflatten(-1, (16, 16))
    codes = (_two_bits(low) | high << 2).float() - 4
    step = halffloats(d) * (scales.float() - 32)
    values: Tensor = (step.unsqueeze(-1) * codes).flatten(-2)
    return values


def _by_table(packed: Tensor) -> Tensor:
    table = torch.tensor(TABLE, dtype=torch.float32, device=packed.device)
    return table[_halves(packed).long()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, codes = blocks.split([2, 16], -1)
    return halffloats(d) * _by_table(codes)


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, codes = blocks.split([2, 2, 4, 128], -1)
    lower = torch.stack([low & 15, low >> 4], -1).flatten(-2)
    upper = (_shifted(high, range(0, 8, 2)) & 3).transpose(-1, -2).flatten(-2)
    step = halffloats(d) * ((lower | upper << 4).float() - 32)
    return (step.unsqueeze(-1) * _by_table(codes.unflatten(-1, (8, 16)))).flatten(-2)


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


DEQUANTIZE: Mapping[
    str, Callable[[Tensor], Tensor]
] = {  # blocks uint8 [rows, blocks, bytes] -> [rows, blocks, columns]
    "bf16": _bf16,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
