# SPDX-License-Identifier: Apache-2.0
"""Which engines load a checkpoint, from its format and schemes alone: read in, or run with, the versions named here."""

from collections.abc import Collection
from typing import NamedTuple

TRANSFORMERS, VLLM, SGLANG = "transformers 5.23", "vLLM 0.33", "SGLang 0.5.23"
MARLIN_GROUPS = (-1, 32, 64, 128)
DENSE_BITS = (3, 5, 6, 7)  # packed without gaps since compressed-tensors 0.20, which vLLM and SGLang don't have yet


class Support(NamedTuple):
    """An engine, whether it loads the checkpoint, and what to know: why not, or what to install."""

    engine: str
    loads: bool
    note: str


class Stored(NamedTuple):
    """A scheme that occurs in the checkpoint."""

    bits: int
    group_size: int
    symmetric: bool


def support(format_name: str, schemes: Collection[Stored]) -> list[Support]:
    """What transformers, vLLM and SGLang make of a checkpoint with these schemes."""
    judges = {"awq": _awq, "gptq": _gptq, "gptq_v2": _gptq, "compressed-tensors": _compressed_tensors}
    return judges[format_name](schemes) if format_name in judges else []


def _awq(schemes: Collection[Stored]) -> list[Support]:
    slow = any(scheme.group_size not in MARLIN_GROUPS for scheme in schemes)
    return [
        Support(VLLM, True, "this group size runs on its slow AWQ kernel" if slow else ""),
        Support(SGLANG, True, ""),
        Support(TRANSFORMERS, True, "needs `pip install gptqmodel optimum accelerate`"),
    ]


def _gptq(schemes: Collection[Stored]) -> list[Support]:
    why = [
        *(["asymmetric GPTQ"] if any(not scheme.symmetric for scheme in schemes) else []),
        *(f"{bits}-bit GPTQ" for bits in sorted({scheme.bits for scheme in schemes} - {4, 8})),
        *(f"group size {g}" for g in sorted({scheme.group_size for scheme in schemes} - set(MARLIN_GROUPS))),
    ]
    served = f"does not load {', '.join(why)}; compressed-tensors may serve" if why else ""
    mixed = len(set(schemes)) > 1
    return [
        Support(VLLM, not why, served),
        Support(SGLANG, not why, served),
        Support(
            TRANSFORMERS,
            not mixed,
            "ignores the per-layer schemes of `dynamic`; GPTQModel itself reads them"
            if mixed
            else "needs `pip install gptqmodel optimum accelerate`",
        ),
    ]


def _compressed_tensors(schemes: Collection[Stored]) -> list[Support]:
    dense = sorted({scheme.bits for scheme in schemes} & set(DENSE_BITS))
    packed = f"reads the older packing of {'-, '.join(map(str, dense))}-bit values" if dense else ""
    slow = any(scheme.bits == 4 and scheme.group_size not in MARLIN_GROUPS for scheme in schemes)
    no_sglang = [
        *(["8-bit asymmetric"] if any(s.bits == 8 and not s.symmetric for s in schemes) else []),
        *(f"{bits}-bit" for bits in sorted({s.bits for s in schemes} - {4, 8} - set(DENSE_BITS))),
        *(f"group size {g}" for g in sorted({s.group_size for s in schemes} - set(MARLIN_GROUPS))),
    ]
    asymmetric = any(not scheme.symmetric for scheme in schemes)
    return [
        Support(VLLM, not dense, packed or ("this group size runs on its Triton kernel" if slow else "")),
        Support(
            SGLANG,
            not dense and not no_sglang,
            packed or (f"does not load {', '.join(no_sglang)}" if no_sglang else ""),
        ),
        Support(
            TRANSFORMERS,
            not asymmetric,
            "5.23.0 cannot load asymmetric compressed-tensors (5.19 to 5.22 can)"
            if asymmetric
            else "needs `pip install compressed-tensors`",
        ),
    ]
