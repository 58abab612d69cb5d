# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint that is there, whoever wrote it: what its linears are, and the weights that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ModelError
from quantkit.formats import Format, autoround
from quantkit.formats.reading import read_schemes, unpack
from quantkit.jsonfile import read_object
from quantkit.model.shapes import DERIVED, Shapes
from quantkit.plan import LinearPlan, decoder_linears, head_linear
from quantkit.records import Result

if TYPE_CHECKING:
    from torch import Tensor, device

SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ -> quant_method


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with the quantization_config of a file of its own where older tools have put it.

    Raises:
        ModelError: there is none, or it is not an object.
    """
    raw = read_object(directory / "config.json", "expected the folder of a quantized checkpoint")
    settings = settings_file(directory, raw)
    if settings is None:
        return raw
    method = {"quant_method": SETTINGS_FILES[settings.name]}
    return raw | {"quantization_config": method | read_object(settings, "expected the settings of its quantization")}


def settings_file(directory: Path, raw: Mapping[str, Any]) -> Path | None:
    """The file that says how a checkpoint is quantized where its config.json (`raw`) does not."""
    if quantization_of(raw):
        return None
    return next((path for name in SETTINGS_FILES if (path := directory / name).is_file()), None)


def served_dtype(raw: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json's content names, for example "float16"."""
    name = raw.get("torch_dtype") or raw.get("dtype")
    return name if isinstance(name, str) else None


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json's content that says how the model is quantized; empty if nothing does.

    Raises:
        ModelError: it is no object, or of a kind that is not read.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config") or {}
    if not isinstance(settings, dict):
        raise ModelError(f"config.json: quantization_config: expected an object, got {settings!r:.80}")
    return autoround.translated(settings)


def writer(raw: Mapping[str, Any], recorded: Result | None = None) -> str:
    """Who wrote a checkpoint, by its config: "gptqmodel:7.7.0"; what does not say is "unknown".

    recorded: the folder's quantkit.json; None: it has none
    """
    if recorded is not None:
        return f"quantkit {recorded.quantkit_version}"
    quantization = quantization_of(raw)
    meta = quantization.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else None
    names = said if isinstance(said, list) else [said] if said else []
    if quantization.get("autoround_version"):
        names = [f"auto-round:{quantization['autoround_version']}"]
    if quantization.get("quant_method") == "compressed-tensors" and quantization.get("version"):
        names = [f"compressed-tensors:{quantization['version']}"]
    return ", ".join(str(name)[:60] for name in names) or "unknown"


def stored_linears(
    model: Shapes, checkpoint: Checkpoint, quantization: Mapping[str, Any]
) -> tuple[Format, tuple[LinearPlan, ...]]:
    """The format, and the linears of the decoder layers in order; a head that is not tied comes last, of layer -1.

    Raises:
        ModelError: see `formats.reading.read_schemes`.
    """
    head = head_linear(model)
    linears = (*decoder_linears(model), *([head] if head else []))
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}
    try:
        fmt, schemes = read_schemes(quantization, shapes, checkpoint.entries)
    except ModelError as error:
        raise ModelError(f"{checkpoint.directory}: {error}") from error
    return fmt, tuple(replace(linear, scheme=schemes[linear.name]) for linear in linears)


def parameters(model: Shapes) -> dict[str, tuple[int, ...]]:
    """Every stored tensor of the 16-bit model, by full name, with its shape."""
    layers = {
        f"{model.layer_name(index)}.{name}": shape
        for index in range(len(model.layer_tensors))
        for name, shape in model.layer_shapes(index).items()
    }
    return model.outside() | layers


def changes_nothing(model: Shapes, checkpoint: Checkpoint, linears: Iterable[LinearPlan], name: str) -> bool:
    """Whether a tensor that the architecture has no place for can be left out: what is derived, tied, or zero."""
    embedding = f"{model.input_name}.weight"
    if name == f"{model.head_name}.weight" and model.tied and embedding in checkpoint.entries:
        return checkpoint.same(name, embedding)
    if name.endswith(DERIVED) or (model.tied and name.startswith(f"{model.head_name}.")):
        return True
    owner, _, key = name.rpartition(".")  # some tools write a bias of zeros for linears that have none
    return key == "bias" and owner in {linear.name for linear in linears} and not bool(checkpoint.read(name).any())


def packed_names(fmt: Format, linear: LinearPlan) -> list[str]:
    """The full names of the tensors that hold a linear's weight."""
    if linear.scheme is None:
        return [f"{linear.name}.weight"]
    specs = fmt.specs(linear.scheme, linear.out_features, linear.in_features)
    return [f"{linear.name}.{key}" for key in specs]


def read_dequantized(
    checkpoint: Checkpoint, names: Iterable[str], linears: Iterable[LinearPlan], fmt: Format, on: device | str = "cpu"
) -> dict[str, Tensor]:
    """The named tensors as stored; those of quantized linears replaced by the weight (float32) they stand for.

    Raises:
        ModelError, NumericsError: with the linear's name, see the formats.
    """
    return dequantized(checkpoint.read_many(names, on), linears, fmt)


def dequantized(stored: Mapping[str, Tensor], linears: Iterable[LinearPlan], fmt: Format) -> dict[str, Tensor]:
    """The same for tensors that are in memory already, which are left as they are."""
    from quantkit.grids.registry import dequantize  # imports torch, which `fit` does without

    tensors = dict(stored)
    for linear in linears:
        if linear.scheme is not None:
            packed = {name.removeprefix(f"{linear.name}."): tensors.pop(name) for name in packed_names(fmt, linear)}
            shape = (linear.out_features, linear.in_features)
            try:
                tensors[f"{linear.name}.weight"] = dequantize(unpack(fmt, packed, linear.scheme, shape))
            except ModelError as error:
                raise ModelError(f"{linear.name}: {error}") from error
    return tensors
