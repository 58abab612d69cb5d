# SPDX-License-Identifier: Apache-2.0
"""Originals that are not stored in 16 bit: FP8 and MXFP4 weights are found by their names, dtypes and shapes.

Files call the scale of an FP8 `weight` either `weight_scale_inv` or `weight_scale`, and it is multiplied by both:
transformers, vLLM, compressed-tensors and ModelOpt agree. MXFP4 is `NAME_blocks` [experts, out, in / 32, 16] with
`NAME_scales` [experts, out, in / 32], which stand for `NAME` [experts, in, out].
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.checkpoint.reader import NUMBERS, Checkpoint, Entry, Scaled
from quantkit.dtypes import ITEMSIZE
from quantkit.errors import ModelError

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("_scale_inv", "_scale")  # behind the name of the weight
BLOCKS, EXPONENTS = "_blocks", "_scales"
MX_BLOCK = 32
USUAL_BLOCK = (128, 128)
# Engines need these to round activations and KV caches. A model in 16 bit has no use for them.
OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")


def stands_for_floats(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config describes weights that are read here as an original: FP8 or MXFP4."""
    method = settings.get("quant_method")
    if method == "modelopt":
        return str(settings.get("quant_algo", "")).startswith("FP8")
    if method == "compressed-tensors":
        weights = _weights(settings)
        return bool(weights) and all((row.get("type"), row.get("num_bits")) == ("float", 8) for row in weights)
    return method in ("fp8", "fbgemm_fp8", "mxfp4")


def as_numbers(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint by the tensors that its files stand for: scaled weights are float32, and their scales are gone.

    settings: the quantization_config of config.json, which may say the size of blocks; empty without one

    Raises:
        ModelError: a float8 weight without its scale, or with one whose shape does not fit.
    """
    where, entries, block = checkpoint.directory, dict(checkpoint.entries), _block_size(settings)
    for name, entry in checkpoint.entries.items():
        exponents = name.removesuffix(BLOCKS) + EXPONENTS
        if name.endswith(BLOCKS) and exponents in checkpoint.entries:
            entries[name.removesuffix(BLOCKS)] = _mxfp4(checkpoint, name, exponents)
            del entries[name], entries[exponents]
        elif entry.dtype in FLOAT8 and not name.endswith(SCALES):
            scales = next((name + end for end in SCALES if name + end in entries), None)
            if scales is None:
                raise ModelError(
                    f"{where}: {name} is stored in float8 and its scale is missing; looked for "
                    f"{' and '.join(name + end for end in SCALES)}; download the model again"
                )
            entries[name] = _fp8(checkpoint, name, scales, block)
            del entries[scales]
    if entries.keys() == checkpoint.entries.keys():
        return checkpoint
    return replace(checkpoint, entries={n: entry for n, entry in entries.items() if not n.endswith(OF_ACTIVATIONS)})


def _numbers(scaled: Scaled, shape: tuple[int, ...]) -> Entry:
    return replace(
        scaled.weight, dtype=NUMBERS, shape=shape, nbytes=ITEMSIZE[NUMBERS] * math.prod(shape), scaled=scaled
    )


def _mxfp4(checkpoint: Checkpoint, blocks: str, exponents: str) -> Entry:
    weight, scales = checkpoint.entries[blocks], checkpoint.entries[exponents]
    if len(weight.shape) < 3 or 2 * weight.shape[-1] != MX_BLOCK or weight.dtype != "uint8":
        raise ModelError(
            f"{checkpoint.directory}: {blocks}: expected uint8 [..., out, groups, {MX_BLOCK // 2}], got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if scales.shape != weight.shape[:-1] or scales.dtype != "uint8":
        raise ModelError(
            f"{checkpoint.directory}: {exponents}: expected uint8 {list(weight.shape[:-1])}, got {scales.dtype} "
            f"{list(scales.shape)}"
        )
    *experts, out, groups, _ = weight.shape
    return _numbers(Scaled(weight, scales), (*experts, groups * MX_BLOCK, out))


def _fp8(checkpoint: Checkpoint, name: str, scales: str, block: tuple[int, int]) -> Entry:
    weight, scale = checkpoint.entries[name], checkpoint.entries[scales]
    rows, columns = (1, *weight.shape)[-2:]
    counts = scale.shape if len(scale.shape) != 1 or len(weight.shape) < 2 else (*scale.shape, 1)
    counts = (1,) * (len(weight.shape) - len(counts)) + counts
    per_matrix, per_row = (1, 1, *counts)[-2:]
    steps = _step(rows, per_matrix, block[0]), _step(columns, per_row, block[1])
    fits = len(counts) == len(weight.shape) and counts[:-2] in (weight.shape[:-2], (1,) * len(counts[:-2]))
    if not fits or None in steps:
        blocks = [-(-size // step) for size, step in zip((rows, columns), block, strict=True)]
        raise ModelError(
            f"{checkpoint.directory}: {scales}: expected one scale, one for each of {rows} rows, or {blocks} for "
            f"blocks of {block[0]} x {block[1]}, got {list(scale.shape)}"
        )
    shared = steps[0] or 1, steps[1] or 1
    return _numbers(Scaled(weight, scale, (math.prod(counts[:-2]), per_matrix, per_row), shared), weight.shape)


def _step(size: int, count: int, block: int) -> int | None:
    """How many rows or columns share a scale; None: so many scales do not fit."""
    if count in (1, size):
        return max(1, size // count)
    return block if -(-size // block) == count else None


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    for size in (settings.get("weight_block_size"), *(row.get("block_structure") for row in _weights(settings))):
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return USUAL_BLOCK


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a compressed-tensors config says of the weights of each group of linears."""
    groups = settings.get("config_groups")
    rows = groups.values() if isinstance(groups, dict) else ()
    return [row["weights"] for row in rows if isinstance(row, dict) and isinstance(row.get("weights"), dict)]
