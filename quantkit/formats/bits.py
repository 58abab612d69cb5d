# SPDX-License-Identifier: Apache-2.0
"""Dense packing of small unsigned integers into int32 words.

The layout is one little-endian bit stream: code i takes the bits [i * bits, (i + 1) * bits), bit 0 is the lowest bit
of word 0, and a code may straddle two words. For 2, 4 and 8 bits this is the familiar "32 / bits codes in a word,
lowest first"; for 3 bits it puts 32 codes in 3 words.

The work is done on bytes: the pattern repeats every few codes (2 codes in 1 byte at 4 bits, 8 codes in 3 bytes at
3 bits), so each byte of the pattern is a few shifts of whole strided columns, and nothing wider than uint8 exists.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32


def words_for(count: int, bits: int) -> int:
    """The int32 words that hold `count` codes."""
    return math.ceil(count * bits / WORD_BITS)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8 [..., n], each below 2**bits) into words (int32 [..., ceil(n * bits / 32)]).

    The last word is filled up with zero bits.
    """
    import torch  # here and not above: see `dtypes`
    from torch.nn.functional import pad

    period, width = _pattern(bits)  # `period` codes fill `width` bytes
    *lead, count = codes.shape
    groups = math.ceil(count / period)
    if groups * period > count:
        codes = pad(codes, (0, groups * period - count))
    codes = codes.view(*lead, groups, period)
    stream = codes.new_zeros(*lead, 4 * words_for(count, bits))
    for byte in range(width):
        first, last = 8 * byte // bits, (8 * byte + 7) // bits  # the codes that have bits in this byte
        parts = [_shifted(codes[..., i], i * bits - 8 * byte) for i in range(first, last + 1)]
        for part in parts[1:]:
            parts[0] |= part
        target = stream[..., byte::width]  # may end before or after the last group: there all bits are zero
        target[..., :groups] = parts[0][..., : target.shape[-1]]
    return _native(stream).view(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (uint8 [..., count]) of the bit stream in words (int32 [..., w])."""
    import torch
    from torch.nn.functional import pad

    period, width = _pattern(bits)
    groups = math.ceil(count / period)
    *lead, size = words.shape
    words = words.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves odd strides at dimensions of 1
    stream = _native(words.view(torch.uint8))
    if 4 * size != groups * width:  # a negative pad cuts
        stream = pad(stream, (0, groups * width - 4 * size))
    stream = stream.view(*lead, groups, width)
    codes = stream.new_empty(*stream.shape[:-1], period)
    for i in range(period):
        byte, offset = divmod(i * bits, 8)
        code = stream[..., byte] >> offset
        if offset + bits > 8:
            code |= stream[..., byte + 1] << (8 - offset)
        codes[..., i] = code.bitwise_and_(2**bits - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def _pattern(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that ends on a byte boundary."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _shifted(codes: Tensor, left: int) -> Tensor:
    return codes.bitwise_left_shift(left) if left >= 0 else codes.bitwise_right_shift(-left)


def _native(stream: Tensor) -> Tensor:
    """Swap the bytes of each word between little-endian and this machine's order."""
    if sys.byteorder == "little" or stream.device.type != "cpu":
        return stream
    return stream.view(*stream.shape[:-1], -1, 4).flip(-1).flatten(-2)
