# SPDX-License-Identifier: Apache-2.0
"""GGUF's blocks of weights (https://github.com/ggml-org/llama.cpp, ggml-common.h): rows cut into blocks of bytes.

    q8_0   34 bytes for  32 weights: d, 32 signed codes                                          w = d q
    q4_0   18 bytes for  32:         d, 16 bytes: column i low, column i + 16 high               w = d (q - 8)
    q4_1   20 bytes for  32:         d, m, 16 bytes in the same order                            w = d q + m
    q4_k  144 bytes for 256:         d, dmin, 8 scales and 8 lows of 6 bits in 12 bytes, codes   w = d s q - dmin l
    q5_k  176 bytes for 256:         d, dmin, the same 12 bytes, fifth bits, the lower four      w = d s q - dmin l
    q6_k  210 bytes for 256:         lower four bits, upper two, 16 scales of 8 bits, d          w = d s (q - 32)

d, m and dmin are float16. Our integers go in without loss where these can hold them: groups that are cut into blocks of
32, symmetric ones of up to 4 bits as q4_0 and up to 8 as q8_0; a zero point z becomes m = -z d in q4_1, if that is a
float16, and any code less its zero point that fits 8 bits can be a q8_0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import ModelError, SchemeError
from quantkit.formats.bits import pack_bits, unpack_bits
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS
from quantkit.grids.registry import dequantize
from quantkit.scheme import NAMED, QuantizedTensor, Scheme, expand

BLOCK, SUPERBLOCK = 32, 256


@dataclass(frozen=True)
class BlockType:
    """A type of tensors in a GGUF file.

    code: its number in the file; columns, nbytes: of a block; file_type: what `general.file_type` says of a model that
    is mostly of it
    """

    name: str
    code: int
    columns: int
    nbytes: int
    file_type: int

    def row_bytes(self, in_features: int) -> int:
        return in_features // self.columns * self.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.columns


TYPES: Mapping[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("f32", 0, 1, 4, 0),
        BlockType("f16", 1, 1, 2, 1),
        BlockType("q4_0", 2, BLOCK, 18, 2),
        BlockType("q4_1", 3, BLOCK, 20, 3),
        BlockType("q8_0", 8, BLOCK, 34, 7),
        BlockType("q4_k", 12, SUPERBLOCK, 144, 14),
        BlockType("q5_k", 13, SUPERBLOCK, 176, 16),
        BlockType("q6_k", 14, SUPERBLOCK, 210, 18),
    )
}
INTEGER_TYPES = ("q4_0", "q4_1", "q8_0")  # one level of scales: our integers can go in as they are
K_TYPES = ("q4_k", "q5_k", "q6_k")


# ---------------------------------------------------------------- one level of scales


def usual_type(scheme: Scheme) -> str:
    """The smallest type that a scheme's integers fit.

    Raises:
        SchemeError: none does.
    """
    if scheme.symmetric:
        return "q4_0" if scheme.bits <= 4 else "q8_0"
    if scheme.bits <= 4:
        return "q4_1"
    if scheme.bits < 8:
        return "q8_0"
    raise SchemeError("gguf has no 8 bits with a zero point: q8_0 is symmetric; quantize with --sym")


def why_not(scheme: Scheme, out_features: int, in_features: int, name: str) -> str | None:
    """None, or one line: why integers of this scheme cannot go into blocks of this type."""
    if name not in INTEGER_TYPES:
        return f"{name} has two levels of scales; integers with one go into {', '.join(INTEGER_TYPES)}"
    columns = scheme.columns_per_group(in_features)
    if in_features % BLOCK or columns % BLOCK:
        what = f"group_size {columns}" if columns % BLOCK else f"in_features {in_features}"
        return f"gguf cuts rows into blocks of {BLOCK}, got {what}; use --group {BLOCK}"
    if name == "q4_0" and not scheme.symmetric:
        return f"q4_0 has no zero points, got {scheme}; use q4_1 or q8_0"
    if name == "q8_0" and scheme.bits == 8 and not scheme.symmetric:
        return f"q8_0 has no zero points, got {scheme}; quantize with --sym"
    if name != "q8_0" and scheme.bits > 4:
        return f"{name} holds 4 bits, got {scheme.bits}; use q8_0"
    return None


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


def _run_why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    if scheme.bits not in (4, 8) or (scheme.bits == 8 and not scheme.symmetric):
        return f"gguf has integers of 4 bits and symmetric ones of 8, got {scheme}; use --w-bit 4, or 8 with --sym"
    if scheme.columns_per_group(in_features) != BLOCK:
        return f"gguf stores a scale per {BLOCK} columns whatever the group is, got {scheme}; use --group {BLOCK}"
    return why_not(scheme, out_features, in_features, usual_type(scheme))


# A run keeps its layers as compressed-tensors, which vLLM loads too, with scales that gguf holds to the last bit.
GGUF = replace(
    COMPRESSED_TENSORS,
    name="gguf",
    why_not=_run_why_not,
    settle=settle,
    block_bytes=lambda scheme, rows, columns: rows * TYPES[usual_type(scheme)].row_bytes(columns),
)


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
    kind = TYPES[name]
    if raw.shape[1] % kind.nbytes:
        raise ModelError(f"{name}: rows of {raw.shape[1]} bytes; expected a multiple of {kind.nbytes}")
    rows = raw.shape[0]
    if name in ("f32", "f16"):
        return raw.contiguous().view(torch.float32 if name == "f32" else torch.float16).float()
    if name in K_TYPES:
        return dequantize(unpack_superblocks(raw, name))
    blocks = raw.view(rows, -1, kind.nbytes)
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
