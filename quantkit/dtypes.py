# SPDX-License-Identifier: Apache-2.0
"""The kinds of numbers that files hold, by the names that torch gives them.

Plans and headers speak of dtypes by name, so that everything that is known before the first tensor (sizes, shapes,
what fits where) is known without importing torch, which takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.errors import NumericsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEMSIZE = {  # bytes of one value
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e5m2": 1,
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
}


SERVED = "float16"  # what checkpoints of ours are served in, unless numbers that it does not hold turn up
WIDER = "bfloat16"  # what is written into config.json then
LARGEST_FLOAT16 = 65504.0
# A few numbers of each layer: the decay rates of state spaces, which act once for each token of the context, and what
# decides between experts.
EXACT = ("A_log", "dt_bias", "e_score_correction_bias")


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name: torch.float16 for "float16"."""
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite: told from the two at the ends, so that nothing is made beside a large tensor."""
    import torch

    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def as_served(tensors: Mapping[str, Tensor], served: str | None) -> dict[str, Tensor]:
    """Stored tensors as an engine has them in memory that serves in a dtype: it casts them when they are read.

    served: the dtype's name; only one with fewer digits than float16 changes what float16 holds
    """
    dtype = torch_dtype(WIDER)
    if served != WIDER:
        return dict(tensors)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def stored_dtype(name: str) -> str:
    """In what a tensor that is not quantized is stored, by its name."""
    return "float32" if name.rpartition(".")[2] in EXACT else "float16"


def to_stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, as checkpoints of ours store it; see `stored_dtype`. It is a copy, for where it
    was read may be used again before it is written.

    Raises:
        NumericsError: a value beyond float16.
    """
    stored = tensor.to(torch_dtype(stored_dtype(name)), copy=True)
    if not finite(stored):
        raise NumericsError(f"{name}: largest value {float(tensor.abs().max()):.3g} is beyond float16 (65504)")
    return stored
