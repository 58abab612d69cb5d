# SPDX-License-Identifier: Apache-2.0
"""What the linears of a checkpoint hold, by their scales, zero points and group index: a few percent of the file."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.dtypes import dtype_name
from quantkit.errors import QuantkitError
from quantkit.formats.reading import unpack_zeros
from quantkit.plan import STORED, LinearPlan
from quantkit.quantized import QuantizedCheckpoint, packed_names
from quantkit.scheme import Scheme


@dataclass(frozen=True)
class Held:
    """What a quantized linear holds, known without its codes.

    scheme: as it is: symmetric also where zero points are stored and all lie in the middle (`central`)
    scattered: whether columns that are side by side are in different groups (act-order)
    scale_dtype: float16 where it holds every scale exactly, else as stored
    """

    scheme: Scheme
    smallest_zero: int
    central: bool
    scattered: bool
    scale_dtype: str


def survey(source: QuantizedCheckpoint) -> dict[str, Held]:
    """Full name -> what a quantized linear holds, from everything but the codes.

    Raises:
        ModelError: tensors that the config does not describe.
    """
    linears = {x.name: _held(source, x, x.scheme) for x in source.linears if x.scheme is not None}
    # One linear alone may have such zero points by chance, and needs them where others of its scheme do.
    stored = {held.scheme for held in linears.values() if not held.central}
    return {
        name: held if held.scheme in stored else replace(held, scheme=replace(held.scheme, symmetric=True))
        for name, held in linears.items()
    }


def _held(source: QuantizedCheckpoint, linear: LinearPlan, scheme: Scheme) -> Held:
    small = {
        key: source.checkpoint.read(name)
        for name in packed_names(source.format, linear)
        if (key := name.removeprefix(f"{linear.name}.")) != source.format.codes
    }
    try:
        zeros = unpack_zeros(source.format, small, scheme, shape_of(linear))
    except QuantkitError as error:
        raise type(error)(f"{linear.name}: {error}") from error
    scales = source.format.scales(small)
    assert scales is not None
    exact = torch.equal(scales.to(torch.float16).float(), scales.float())
    scattered = "g_idx" in small and blocks_of(small["g_idx"], scheme, linear.in_features) is None
    central = bool((zeros == scheme.middle).all())
    return Held(scheme, int(zeros.min()), central, scattered, STORED if exact else dtype_name(scales.dtype))


def shape_of(linear: LinearPlan) -> tuple[int, int]:
    """(out_features, in_features)"""
    return (linear.out_features, linear.in_features)


def blocks_of(g_idx: Tensor, scheme: Scheme, in_features: int) -> Tensor | None:
    """The group of each block of consecutive columns [groups], if each block is one group of its own; else None."""
    grouped = g_idx.view(scheme.groups(in_features), -1)
    order = grouped[:, 0]
    whole = bool((grouped == order.unsqueeze(1)).all())
    return order.long() if whole and len(set(order.tolist())) == len(order) else None
