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

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import SchemeError
from quantkit.formats.base import TensorSpec, matching, no_extra_files
from quantkit.formats.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.names import Fused, QuantizedLayer, check_layers
from quantkit.scheme import NAMED, QuantizedTensor, Scheme

if TYPE_CHECKING:  # sizes are planned before torch is needed
    from torch import Tensor

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
READ_TYPES: Mapping[str, BlockType] = {  # of files of other tools; see `read_blocks`
    t.name: t
    for t in (
        BlockType("bf16", 30, 1, 2, 32),
        BlockType("q5_0", 6, BLOCK, 22, 8),
        BlockType("q5_1", 7, BLOCK, 24, 9),
        BlockType("q2_k", 10, SUPERBLOCK, 84, 10),
        BlockType("q3_k", 11, SUPERBLOCK, 110, 12),
        BlockType("iq4_nl", 20, BLOCK, 18, 25),
        BlockType("iq4_xs", 23, SUPERBLOCK, 136, 30),
    )
}
ALL_TYPES: Mapping[str, BlockType] = {**TYPES, **READ_TYPES}
_READ_SCHEMES = {
    "q5_0": Scheme(5, BLOCK, True, "q5_0"),
    "q5_1": Scheme(5, BLOCK, False, "q5_1"),
    "q2_k": Scheme(2, 16, False, "q2_k"),
    "q3_k": Scheme(3, 16, True, "q3_k"),
    "iq4_nl": Scheme(4, BLOCK, True, "iq4_nl"),
    "iq4_xs": Scheme(4, BLOCK, True, "iq4_xs"),
}
UNREAD_TYPES: Mapping[int, str] = {  # numbers of types that are not read, with llama.cpp's names
    9: "q8_1",
    15: "q8_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    21: "iq3_s",
    22: "iq2_s",
    24: "i8",
    25: "i16",
    26: "i32",
    27: "i64",
    28: "f64",
    29: "iq1_m",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
}


def scheme_of_type(name: str) -> Scheme | None:
    """The scheme of a type's blocks; None: they hold floats."""
    return NAMED.get(name) or _READ_SCHEMES.get(name)


INTEGER_TYPES = ("q4_0", "q4_1", "q8_0")  # one level of scales: our integers can go in as they are
K_TYPES = ("q4_k", "q5_k", "q6_k")
OUTSIDE_TYPES = ("f16", "q8_0", "q6_k")  # of the embedding and the head
RUN_TYPES = (*INTEGER_TYPES, *K_TYPES)


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


# ---------------------------------------------------------------- what a run keeps until the file is written


def _run_why_not(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    if scheme.grid in K_TYPES:
        if in_features % SUPERBLOCK:
            return (
                f"{scheme.grid} cuts rows into blocks of {SUPERBLOCK}, got in_features {in_features}; "
                "use --type q4_0, q4_1 or q8_0, whose blocks are 32"
            )
        return None
    if scheme.grid != "integer":
        return f"gguf has no type for {scheme}; expected {', '.join(RUN_TYPES)}"
    if scheme.bits not in (4, 8) or (scheme.bits == 8 and not scheme.symmetric):
        return f"gguf has integers of 4 bits and symmetric ones of 8, got {scheme}; use --w-bit 4, or 8 with --sym"
    if scheme.columns_per_group(in_features) != BLOCK:
        return f"gguf stores a scale per {BLOCK} columns whatever the group is, got {scheme}; use --group {BLOCK}"
    return why_not(scheme, out_features, in_features, usual_type(scheme))


def type_of(scheme: Scheme) -> str:
    """The type that the linears of a run with this scheme get."""
    return scheme.grid if scheme.grid in K_TYPES else usual_type(scheme)


def _block_specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    return {"blocks": TensorSpec("uint8", (out_features, TYPES[type_of(scheme)].row_bytes(in_features)))}


def _block_pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    from quantkit.formats.blocks import pack, pack_superblocks

    if quantized.scheme.grid in K_TYPES:
        return {"blocks": pack_superblocks(quantized)}
    return {"blocks": pack(quantized, type_of(quantized.scheme))}


def _block_unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    from quantkit.formats.blocks import unpack, unpack_superblocks

    (blocks,) = matching(tensors, _block_specs(scheme, *shape))
    if scheme.grid in K_TYPES:
        return unpack_superblocks(blocks, scheme.grid)
    return unpack(blocks, type_of(scheme), scheme)


def _no_config(
    quantized: Sequence[QuantizedLayer], kept: Sequence[str], fused: Fused, **options: Any
) -> dict[str, Any]:
    """Nothing: blocks in safetensors are read by nobody but us."""
    check_layers(quantized, kept, fused)
    return {}


def _specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    held = _block_specs if scheme.grid in K_TYPES else COMPRESSED_TENSORS.specs
    return held(scheme, out_features, in_features)


def _pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    return (_block_pack if quantized.scheme.grid in K_TYPES else COMPRESSED_TENSORS.pack)(quantized)


def _unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    return (_block_unpack if scheme.grid in K_TYPES else COMPRESSED_TENSORS.unpack)(tensors, scheme, shape)


def _settle(quantized: QuantizedTensor) -> QuantizedTensor:
    from quantkit.formats.blocks import settle

    return settle(quantized) if quantized.scheme.grid == "integer" else quantized


def _config(quantized: Sequence[QuantizedLayer], kept: Sequence[str], fused: Fused, **options: Any) -> dict[str, Any]:
    """As compressed-tensors, which vLLM loads too, where all are integers."""
    integers = all(scheme.grid == "integer" for _, scheme in quantized)
    return (COMPRESSED_TENSORS.config if integers else _no_config)(quantized, kept, fused, **options)


# A run keeps its layers as compressed-tensors, which vLLM loads too, with scales that gguf holds to the last bit; or,
# where these are K-quants, as the blocks of the file.
GGUF = replace(
    COMPRESSED_TENSORS,
    name="gguf",
    quant_method="",
    grids=("integer", *K_TYPES),
    why_not=_run_why_not,
    specs=_specs,
    pack=_pack,
    unpack=_unpack,
    settle=_settle,
    config=_config,
    extra_files=no_extra_files,
    group_size=BLOCK,
    fixed_zero=(8,),
    packages=("gguf", "accelerate"),
    zeros_dequantized=False,
    block_bytes=lambda scheme, rows, columns: rows * TYPES[type_of(scheme)].row_bytes(columns),
)

# The same where the file alone is wanted: all linears are kept as its blocks.
GGUF_ALONE = replace(GGUF, specs=_block_specs, pack=_block_pack, unpack=_block_unpack, config=_no_config)
