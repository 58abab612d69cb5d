# SPDX-License-Identifier: Apache-2.0
"""Codes in GGUF's blocks and back; `gguf` says what the types are."""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.errors import ModelError, SchemeError
from quantkit.formats.bits import pack_bits, unpack_bits
from quantkit.formats.gguf import ALL_TYPES, BLOCK, K_TYPES, SUPERBLOCK, TYPES, why_not
from quantkit.formats.read_blocks import DEQUANTIZE
from quantkit.grids.registry import dequantize
from quantkit.scheme import NAMED, QuantizedTensor, Scheme, expand

# ---------------------------------------------------------------- one level of scales


def inexact_lows(quantized: QuantizedTensor) -> int:
    """How many groups have a zero point times scale that float16, and so q4_1, does not hold exactly."""
    low = quantized.zeros.float() * quantized.scales.float()
    return int((low.to(torch.float16).float() != low).sum())


def settle(quantized: QuantizedTensor) -> QuantizedTensor:
    """The same codes with each scale moved to the nearest whose product with its zero point is a float16.

    A zero point with k binary digits, trailing zeros not counted, leaves the scale 11 - k of its 11: with 4 bits the
    scale moves by at most 2^-7 of itself, by nothing where the zero point is 0, 1, 2, 4 or 8.
    """
    zero = quantized.zeros.to(torch.int32)
    odd = zero // (zero & -zero).clamp(min=1)
    digits = (odd.float().log2().floor() + 1).clamp(min=1)  # 1 for a zero point of 0 too
    fraction, exponent = torch.frexp(quantized.scales.float())
    unit = torch.exp2((exponent - 11 + digits).clamp(min=-24))  # 2^-24: the last digit that any float16 has
    moved = (torch.round(torch.ldexp(fraction, exponent) / unit) * unit).to(torch.float16)
    return replace(quantized, scales=torch.where(digits > 1, moved, quantized.scales))


def pack(quantized: QuantizedTensor, name: str, *, exact: bool = True) -> Tensor:
    """Integers -> blocks, uint8 [out_features, row bytes].

    exact: refuse what the type does not hold to the last bit; otherwise q4_1's m is rounded to float16.

    Raises:
        SchemeError: the type cannot hold them, with what would.
    """
    scheme = quantized.scheme
    reason = why_not(scheme, quantized.out_features, quantized.in_features, name)
    if reason is not None:
        raise SchemeError(reason)
    if quantized.g_idx is not None:
        raise SchemeError("gguf has no group index (act-order without static groups); quantize without it")
    if exact and name == "q4_1" and (count := inexact_lows(quantized)):
        raise SchemeError(
            f"q4_1 stores -zero * scale in float16, which is inexact in {count} of {quantized.scales.numel()} groups; "
            "use q8_0, which holds these integers exactly, or quantize with --format gguf"
        )
    blocks_per_group = quantized.in_features // quantized.scales.shape[1] // BLOCK
    scales = _bytes(expand(quantized.scales, blocks_per_group))
    codes = quantized.codes.view(quantized.out_features, -1, BLOCK)  # [out, blocks, 32]
    zeros = expand(quantized.zeros, blocks_per_group).unsqueeze(2)
    if name == "q8_0":
        signed = codes.to(torch.int16) - zeros
        return torch.cat([scales, signed.to(torch.int8).view(torch.uint8)], 2).flatten(1)
    if name == "q4_0":
        return torch.cat([scales, _halves(codes + (8 - scheme.middle))], 2).flatten(1)
    lows = expand(-quantized.zeros.float() * quantized.scales.float(), blocks_per_group)
    return torch.cat([scales, _bytes(lows.to(torch.float16)), _halves(codes)], 2).flatten(1)


def _bytes(values: Tensor) -> Tensor:
    """float16 [out, blocks] -> uint8 [out, blocks, 2]."""
    return values.contiguous().unsqueeze(2).view(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    """Codes below 16 [..., n] -> bytes [..., n / 2]: the first half low, the second high."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unhalves(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], -1)


# ---------------------------------------------------------------- two levels of scales


def pack_superblocks(quantized: QuantizedTensor) -> Tensor:
    """K-quants -> blocks, uint8 [out_features, row bytes]."""
    name = quantized.scheme.grid
    rows, superblocks = quantized.outer["d"].shape
    codes = quantized.codes.view(rows, superblocks, SUPERBLOCK)
    d, dmin = _bytes(quantized.outer["d"]), _bytes(quantized.outer["dmin"])
    scales = quantized.scales.view(rows, superblocks, -1)
    if name == "q6_k":
        quarters = codes.view(rows, superblocks, 2, 4, 32)  # columns l, l + 32, l + 64, l + 96 share bytes
        low = quarters[..., :2, :] & 15 | (quarters[..., 2:, :] & 15) << 4
        high = sum((quarters[..., i, :] >> 4) << 2 * i for i in range(4))
        assert isinstance(high, Tensor)
        signed = scales.to(torch.int8).view(torch.uint8)
        return torch.cat([low.flatten(2), high.flatten(2), signed, d], 2).flatten(1)
    six = _six_bits(scales.to(torch.uint8), quantized.zeros.view(rows, superblocks, -1).to(torch.uint8))
    pairs = codes.view(rows, superblocks, 4, 2, 32)
    low = pairs[..., 0, :] & 15 | (pairs[..., 1, :] & 15) << 4
    fifth = [] if name == "q4_k" else [_fifth_bits(codes)]
    return torch.cat([d, dmin, six, *fifth, low.flatten(2)], 2).flatten(1)


def _six_bits(scales: Tensor, lows: Tensor) -> Tensor:
    """Two times 8 values below 64 -> 12 bytes: 4 of each whole, the others' upper 2 bits above them, then the rest."""
    s, m = scales, lows
    return torch.cat(
        [
            s[..., :4] | (s[..., 4:] >> 4) << 6,
            m[..., :4] | (m[..., 4:] >> 4) << 6,
            s[..., 4:] & 15 | (m[..., 4:] & 15) << 4,
        ],
        -1,
    )


def _unsix(packed: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = packed.split(4, dim=-1)
    scales = torch.cat([a & 63, c & 15 | (a >> 6) << 4], -1)
    return scales, torch.cat([b & 63, c >> 4 | (b >> 6) << 4], -1)


def _fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bits of codes [rows, superblocks, 256]: bit i of byte l is that of column 32 i + l."""
    columns = codes.view(*codes.shape[:2], 8, 32).transpose(2, 3)
    return pack_bits((columns >> 4).contiguous().flatten(2), 1).view(torch.uint8)


def unpack_superblocks(raw: Tensor, name: str) -> QuantizedTensor:
    """Blocks uint8 [out_features, row bytes] -> K-quants."""
    rows = raw.shape[0]
    blocks = raw.view(rows, -1, TYPES[name].nbytes)
    if name == "q6_k":
        low, high, scales, d = blocks.split([128, 64, 16, 2], dim=2)
        half = low.reshape(rows, -1, 2, 2, 32)
        four = torch.cat([half & 15, half >> 4], 3)  # [rows, superblocks, 2, 4, 32]
        upper = torch.stack([high.reshape(rows, -1, 2, 32) >> 2 * i & 3 for i in range(4)], 3)
        codes = (four | upper << 4).flatten(1)
        signed = scales.contiguous().view(torch.int8).to(torch.int16).flatten(1)
        step = _halffloats(d)
        outer = {"d": step, "dmin": torch.zeros_like(step)}
        return QuantizedTensor(codes, signed, torch.zeros_like(signed), NAMED[name], outer=outer)
    sizes = [2, 2, 12, 128] if name == "q4_k" else [2, 2, 12, 32, 128]
    d, dmin, six, *fifth, low = blocks.split(sizes, dim=2)
    codes = _unhalves(low.reshape(rows, -1, 4, 32)).flatten(2)
    if fifth:
        bits = unpack_bits(fifth[0].contiguous().view(torch.int32), 1, SUPERBLOCK).view(rows, -1, 32, 8)
        codes = codes | (bits.transpose(2, 3).flatten(2) << 4)
    scales, lows = (part.to(torch.int16).flatten(1) for part in _unsix(six))
    outer = {"d": _halffloats(d), "dmin": _halffloats(dmin)}
    return QuantizedTensor(codes.flatten(1), scales, lows, NAMED[name], outer=outer)


def _halffloats(raw: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2] -> float16 [rows, blocks]."""
    return raw.contiguous().view(torch.float16).squeeze(2)


# ---------------------------------------------------------------- any type


def dequantize_blocks(raw: Tensor, name: str) -> Tensor:
    """Blocks uint8 [rows, row bytes] of any type -> the float32 values [rows, columns] that llama.cpp computes with.

    Raises:
        ModelError: rows that are no whole number of blocks.
    """
    kind = ALL_TYPES[name]
    if raw.shape[1] % kind.nbytes:
        raise ModelError(f"{name}: rows of {raw.shape[1]} bytes; expected a multiple of {kind.nbytes}")
    rows = raw.shape[0]
    if name in ("f32", "f16"):
        return raw.contiguous().view(torch.float32 if name == "f32" else torch.float16).float()
    if name in K_TYPES:
        return dequantize(unpack_superblocks(raw, name))
    blocks = raw.view(rows, -1, kind.nbytes)
    if name in DEQUANTIZE:
        return DEQUANTIZE[name](blocks).flatten(1)
    d = _halffloats(blocks[..., :2]).float().unsqueeze(2)
    if name == "q8_0":
        return (d * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(1)
    if name == "q4_0":
        return (d * (_unhalves(blocks[..., 2:]).float() - 8)).flatten(1)
    return (d * _unhalves(blocks[..., 4:]).float() + _halffloats(blocks[..., 2:4]).float().unsqueeze(2)).flatten(1)


def unpack(raw: Tensor, name: str, scheme: Scheme) -> QuantizedTensor:
    """Blocks of `pack` -> the integers that went in: the proof that nothing was lost.

    Raises:
        ModelError: blocks that no integers of this scheme stand for.
    """
    kind, rows = TYPES[name], raw.shape[0]
    blocks = raw.view(rows, -1, kind.nbytes)
    in_features = blocks.shape[1] * BLOCK
    step = scheme.columns_per_group(in_features) // BLOCK
    scales = _halffloats(blocks[..., :2])
    if name == "q4_1":
        zeros = -_halffloats(blocks[..., 2:4]).float() / scales.float()
        codes = _unhalves(blocks[..., 4:]).to(torch.int16)
    elif name == "q4_0":
        zeros = torch.full_like(scales, scheme.middle, dtype=torch.float32)
        codes = _unhalves(blocks[..., 2:]).to(torch.int16) - (8 - scheme.middle)
    else:
        codes = blocks[..., 2:].contiguous().view(torch.int8).to(torch.int16)
        zeros = torch.full_like(scales, scheme.middle, dtype=torch.float32)
        if not scheme.symmetric:
            raise ModelError("q8_0 does not say where the zero points were; compare the weights instead")
        codes = codes + scheme.middle
    whole = zeros.round()
    scales, whole = scales[:, ::step].contiguous(), whole[:, ::step].to(torch.uint8).contiguous()
    found = QuantizedTensor(codes.flatten(1).to(torch.uint8), scales, whole, scheme)
    if not torch.equal(pack(found, name, exact=False), raw):
        raise ModelError(f"{name}: the blocks are not those of {scheme}")
    return found
