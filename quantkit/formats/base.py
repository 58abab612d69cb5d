# SPDX-License-Identifier: Apache-2.0
"""What a format is, and the checks that all formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.dtypes import ITEMSIZE, dtype_name
from quantkit.errors import ModelError, NumericsError, SchemeError
from quantkit.formats.fields import Resolve
from quantkit.formats.names import Fused, QuantizedLayer
from quantkit.scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor


SCALES = "float16"  # how every format stores its scales


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor before it exists; dtype: a name of `dtypes`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class ConfigBuilder(Protocol):
    """Builds config.json's `quantization_config`.

    quantized: every quantized linear; fused: see `names.Fused`
    kept: the full names of the linears (within decoder layers, and lm_head) that stay in 16 bit
    The keywords are what only some formats write down: the damping and column order of GPTQ.

    Raises:
        SchemeError: the format cannot hold this choice of layers and schemes. It needs no weights, so call it before
            any work.
    """

    def __call__(
        self,
        quantized: Sequence[QuantizedLayer],
        kept: Sequence[str],
        fused: Fused,
        *,
        damp_percent: float = 0.01,
        desc_act: bool = False,
        static_groups: bool = False,
    ) -> dict[str, Any]: ...


def as_it_is(quantized: QuantizedTensor) -> QuantizedTensor:
    """For formats that hold every tensor of their schemes."""
    return quantized


def scales_by_column(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """For formats that store `scales` as [groups, out]."""
    return tensors["scales"].t().contiguous() if "scales" in tensors else None


def no_older(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, Tensor]:
    """For formats whose layout never changed."""
    return tensors


def as_today(key: str, scheme: Scheme, shape: tuple[int, int], dense: tuple[int, ...]) -> tuple[int, ...]:
    """The same for the shapes of tensors."""
    return dense


@dataclass(frozen=True)
class Format:
    """A way to store quantized linears. Tensor keys are local to the linear: "qweight", not "model.layers.0...".

    name:        what `--format` says
    quant_method: what config.json's `quantization_config` calls it; empty where no checkpoint is read by it
    reads:       such a config, of any tool -> (full name of a linear -> its scheme, or None for 16 bit); None: the
                 config is of another format with the same quant_method; ModelError: what is not supported
    grids:       names of the grids that it holds
    codes:       the key of the tensor that holds the codes
    says_all:    whether readers go by the config alone; otherwise a linear that is stored as it was is in 16 bit
    holds_mixed: whether one checkpoint can hold several schemes
    specs:       (scheme, out_features, in_features) -> exactly the tensors that `pack` returns; SchemeError if why_not
    why_not:     (scheme, out_features, in_features) -> None, or one line: what cannot be held, and what would hold it
    min_zero:    the smallest zero point that every reader of the format decodes alike
    settle:      QuantizedTensor -> the nearest that the format holds to the last bit, where that is not every one;
                 called once, when the integers are made, so that all that is calibrated after sees what is written
    pack:        QuantizedTensor -> tensors; SchemeError if the format cannot hold it
    unpack:      (tensors, scheme, (out_features, in_features)) -> QuantizedTensor; other keys, such as "bias", are
                 ignored; ModelError if a tensor is missing or of another shape or kind
    unpack_zeros: the same tensors, or those of the zero points alone -> zero points, uint8 [out, groups]
    config:      see ConfigBuilder
    extra_files: the quantization_config -> further JSON files of the checkpoint, by name
    block_bytes: (scheme, out_features, in_features) -> bytes of a linear in the file that an engine loads, where that
                 is another than the checkpoint: a .gguf, whose vectors are float32
    scales:      tensors as stored -> scales [out, groups] in the type that they have, or None where there are none
    older:       (tensors, scheme, shape) -> the tensors of an older layout as `unpack` reads them
    optional:    keys of tensors that files of other tools may lack, and `unpack` as well
    older_shape: (key, scheme, shape, shape of the tensor today) -> its shape in that layout
    settings_file: where older tools put the config, if not into config.json
    version_key: the key of the config that holds the version of the tool of its name that wrote it
    wide_scales: whether readers take scales that float16 does not hold
    stores_zeros: whether zero points are stored also where all lie in the middle, and its config says so
    usual_for:   (scheme, whether a recipe has rules) -> whether engines run the scheme best from this format
    group_size:  columns of a group where the user has not said it
    fixed_zero:  bits that it holds with a fixed zero point alone
    packages:    what transformers needs beside itself to load it
    zeros_dequantized: whether transformers loads stored zero points only where it dequantizes the weights
    """

    name: str
    quant_method: str
    reads: Callable[[Mapping[str, Any]], Resolve | None]
    codes: str
    holds_mixed: bool
    specs: Callable[[Scheme, int, int], dict[str, TensorSpec]]
    why_not: Callable[[Scheme, int, int], str | None]
    min_zero: Callable[[Scheme], int]
    pack: Callable[[QuantizedTensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Scheme, tuple[int, int]], QuantizedTensor]
    unpack_zeros: Callable[[Mapping[str, Tensor], Scheme, tuple[int, int]], Tensor]
    config: ConfigBuilder
    extra_files: Callable[[dict[str, Any]], dict[str, dict[str, Any]]]
    block_bytes: Callable[[Scheme, int, int], int] | None = None
    settle: Callable[[QuantizedTensor], QuantizedTensor] = as_it_is
    grids: tuple[str, ...] = ("integer",)
    scales: Callable[[Mapping[str, Tensor]], Tensor | None] = scales_by_column
    says_all: bool = False
    optional: tuple[str, ...] = ()
    older: Callable[[Mapping[str, Tensor], Scheme, tuple[int, int]], Mapping[str, Tensor]] = no_older
    older_shape: Callable[[str, Scheme, tuple[int, int], tuple[int, ...]], tuple[int, ...]] = as_today
    settings_file: str = ""
    version_key: str = ""
    wide_scales: bool = False
    stores_zeros: bool = False
    usual_for: Callable[[Scheme, bool], bool] = lambda scheme, mixed: True
    group_size: int = 128
    fixed_zero: tuple[int, ...] = ()
    packages: tuple[str, ...] = ()
    zeros_dequantized: bool = False

    @property
    def tag(self) -> str:
        """What the hub calls it."""
        return self.quant_method or self.name

    @property
    def in_one_file(self) -> bool:
        """Whether what engines load is one file, and not the checkpoint: a .gguf."""
        return self.block_bytes is not None


def no_extra_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {}


def why_not_grid(format_name: str, scheme: Scheme) -> str:
    """Why a format of integers does not hold another grid."""
    return f"{format_name} holds integers, got {scheme}; --format gguf holds llama.cpp's types"


def why_not_groups(scheme: Scheme, in_features: int) -> str | None:
    """One line if the group size does not divide the row; no format holds that."""
    try:
        scheme.groups(in_features)
    except SchemeError as error:
        return str(error)
    return None


def require(reason: str | None) -> None:
    """Raise a SchemeError if there is a reason why not."""
    if reason is not None:
        raise SchemeError(reason)


def refuse_g_idx(format_name: str, quantized: QuantizedTensor) -> None:
    """Raise a SchemeError for groups that are not consecutive columns."""
    if quantized.g_idx is not None:
        raise SchemeError(f"{format_name} has no group index (act-order without static groups); gptq holds it")


def matching(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> list[Tensor]:
    """The tensors that `specs` names, in its order, of the shapes and dtypes it says.

    Scales may come in any floating type (files of other tools hold bfloat16) and are returned as float16.

    Raises:
        ModelError: a tensor is missing, or has another shape or dtype.
        NumericsError: a scale that is not finite in float16.
    """
    found = []
    for key, spec in specs.items():
        tensor = tensors.get(key)
        if tensor is None:
            raise ModelError(f"{key}: missing; found {', '.join(sorted(tensors)) or 'no tensor'}")
        floating, found_dtype = spec.dtype == SCALES, dtype_name(tensor.dtype)
        if tuple(tensor.shape) != spec.shape or (
            found_dtype != spec.dtype and not (floating and tensor.is_floating_point())
        ):
            raise ModelError(
                f"{key}: expected {spec.dtype} {list(spec.shape)}, got {found_dtype} {list(tensor.shape)}; "
                "is the quantization_config of this checkpoint right?"
            )
        if floating:
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise NumericsError(f"{key}: has values that are not finite in {spec.dtype}")
        found.append(tensor)
    return found


def check_symmetric(zeros: Tensor, scheme: Scheme) -> None:
    """Raise a ModelError if the scheme is symmetric and the stored zero points are not all in the middle."""
    if scheme.symmetric and not (zeros == scheme.middle).all():
        raise ModelError(
            f"zero points: expected {scheme.middle} everywhere in a symmetric scheme, got "
            f"{int(zeros.min())} to {int(zeros.max())}; the config names another format version, or is not symmetric"
        )
