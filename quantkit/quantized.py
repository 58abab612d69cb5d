# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint that is there, whoever wrote it: what its linears are, and the weights that they stand for.

    opened = open_quantized(folder)
    opened.read(["model.layers.0.mlp.up_proj.weight"])  # dequantized

Whoever looks at such a folder opens it here: convert, the export to GGUF, verify, inspect and fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.original import stands_for_floats
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, shorten
from quantkit.dtypes import as_served
from quantkit.errors import ModelError, QuantkitError
from quantkit.formats import FORMATS, Format, autoround
from quantkit.formats.reading import read_schemes, unpack
from quantkit.jsonfile import read_object
from quantkit.model.shapes import DERIVED, Shapes, shapes_of, with_embedding
from quantkit.plan import OUTSIDE, LinearPlan, decoder_linears, head_linear
from quantkit.records import Result

if TYPE_CHECKING:
    from torch import Tensor, device

    from quantkit.model.skeleton import Architecture
    from quantkit.scheme import QuantizedTensor

SETTINGS_FILES = {fmt.settings_file: fmt.quant_method for fmt in FORMATS.values() if fmt.settings_file}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on the disk.

    directory: the folder of its config.json and tokenizer
    raw: the content of that config.json
    model: the tensors of the 16-bit model, by that config
    linears: those of the decoder layers in order; a head that is not tied comes last, of layer -1
    cast: the dtype that all floats of its files are cast to before they stand for anything (None: as they are), as an
        engine does; see `pipeline.run`
    """

    directory: Path
    raw: Mapping[str, Any]
    model: Shapes
    checkpoint: Checkpoint
    format: Format
    linears: tuple[LinearPlan, ...]
    cast: str | None = None

    @property
    def files(self) -> list[str]:
        """The names of the files that hold its tensors."""
        return self.checkpoint.files

    @property
    def format_name(self) -> str:
        """As `--format` says it."""
        return self.format.name

    @property
    def served(self) -> str | None:
        """The dtype that its config.json names, for example "float16"."""
        name = self.raw.get("torch_dtype") or self.raw.get("dtype")
        return name if isinstance(name, str) else None

    @property
    def quantization(self) -> dict[str, Any]:
        """How its config.json says that it is quantized."""
        return quantization_of(self.raw)

    @property
    def decoder(self) -> tuple[LinearPlan, ...]:
        """The linears of the decoder layers."""
        return tuple(linear for linear in self.linears if linear.layer != OUTSIDE)

    @property
    def quantized(self) -> tuple[LinearPlan, ...]:
        """The quantized linears."""
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @property
    def bits_per_weight(self) -> float:
        """Every stored bit of the quantized linears over their weights."""
        weights = sum(linear.out_features * linear.in_features for linear in self.quantized)
        return 8 * sum(map(self.stored_bytes, self.quantized)) / weights

    def stored_bytes(self, linear: LinearPlan) -> int:
        """The bytes of the tensors that hold a linear's weight."""
        return sum(self.checkpoint.entries[name].nbytes for name in packed_names(self.format, linear))

    def read(self, names: Iterable[str], device: device | str = "cpu") -> dict[str, Tensor]:
        """Parameters of the 16-bit model by their full names; quantized weights come dequantized (float32).

        Raises:
            ModelError, NumericsError: a damaged file, with the linear's name.
        """
        wanted = list(names)
        linears = [linear for linear in self.quantized if f"{linear.name}.weight" in set(wanted)]
        packed = {f"{linear.name}.weight": packed_names(self.format, linear) for linear in linears}
        stored = self.checkpoint.read_many([n for name in wanted for n in packed.get(name, [name])], device)
        return dequantized(as_served(stored, self.cast), linears, self.format)

    def read_quantized(self, linear: LinearPlan) -> QuantizedTensor:
        """A quantized linear as it is stored: codes, scales, zero points.

        Raises:
            ModelError, NumericsError: a damaged file, with the linear's name.
        """
        return unpacked(self.checkpoint.read_many(packed_names(self.format, linear)), linear, self.format)


def open_quantized(
    directory: Path, model_of: Callable[[Mapping[str, Any], Checkpoint], Shapes] | None = None
) -> QuantizedCheckpoint:
    """Read config.json and the headers of a quantized checkpoint of any tool.

    Args:
        directory: its folder
        model_of: the content of its config.json, and its tensors -> the model that they are of; by default `shapes_in`

    Raises:
        ModelError: not quantized, a kind that is not supported, or a damaged checkpoint.
    """
    raw = read_config(directory)
    quantization = quantization_of(raw)
    if not quantization:
        raise ModelError(f"{directory}: config.json has no quantization_config; expected a quantized checkpoint")
    checkpoint = open_checkpoint(directory)
    model = (model_of or shapes_in)(raw, checkpoint)
    checkpoint = with_embedding(model, checkpoint)
    fmt, linears = stored_linears(model, checkpoint, quantization)
    if all(linear.scheme is None for linear in linears):
        raise ModelError(f"{directory}: every linear is stored in 16 bit; expected a quantized checkpoint")
    return QuantizedCheckpoint(directory, raw, model, checkpoint, fmt, linears)


def require_complete(opened: QuantizedCheckpoint, unneeded: Collection[str] = ()) -> tuple[str, ...]:
    """Check that every tensor of the model is stored in its shape, and return the stored names that change nothing.

    Args:
        opened: the checkpoint
        unneeded: names that may be there besides

    Raises:
        ModelError: tensors are missing, of another shape, or have no place in the model and may change it.
    """
    where, entries = opened.directory, opened.checkpoint.entries
    packed = {f"{linear.name}.weight": packed_names(opened.format, linear) for linear in opened.quantized}
    plain = {name: shape for name, shape in parameters(opened.model).items() if name not in packed}
    needed = {*plain, *opened.model.copied, *(name for names in packed.values() for name in names)}
    if missing := sorted(needed - set(entries)):
        raise ModelError(f"{where}: {len(missing)} tensors missing ({shorten(missing)})")
    for name, shape in plain.items():
        if entries[name].shape != shape:
            raise ModelError(f"{where}: {name}: expected {list(shape)} by config.json, got {list(entries[name].shape)}")
    others = tuple(sorted(set(entries) - needed))
    unknown = [
        name
        for name in others
        if name not in unneeded and not changes_nothing(opened.model, opened.checkpoint, opened.linears, name)
    ]
    if unknown:
        raise ModelError(
            f"{where}: {len(unknown)} tensors have no place in the model ({shorten(unknown)}); "
            "without them it would be another"
        )
    return others


# ---------------------------------------------------------------- config.json


def shapes_in(raw: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> Shapes:
    """What a config.json's content says of a model's tensors; how it is quantized is ignored.

    checkpoint: its tensors, where they are there

    Raises:
        ModelError: see `model.config.config_from_dict` and `model.skeleton.build`.
    """
    known = shapes_of(_unquantized(raw))
    return known if known is not None else architecture_in(raw, checkpoint)


def architecture_in(raw: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> Architecture:
    """The same with the modules of the model, on the meta device, and every default of its config."""
    from quantkit.model.config import config_from_dict  # takes seconds, and is seldom needed
    from quantkit.model.skeleton import build

    return build(config_from_dict(_unquantized(raw)), checkpoint)


def _unquantized(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")}


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


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json's content that says how the model is quantized; empty if nothing does.

    FP8 and MXFP4 count as nothing: such weights are read as an original's.

    Raises:
        ModelError: it is no object, or of a kind that is not read.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config") or {}
    if not isinstance(settings, dict):
        raise ModelError(f"config.json: quantization_config: expected an object, got {settings!r:.80}")
    return {} if stands_for_floats(settings) else autoround.translated(settings)


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
    method = quantization.get("quant_method")
    for fmt in FORMATS.values():
        if fmt.quant_method == method and quantization.get(fmt.version_key):
            names = [f"{method}:{quantization[fmt.version_key]}"]
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


def dequantized(stored: Mapping[str, Tensor], linears: Iterable[LinearPlan], fmt: Format) -> dict[str, Tensor]:
    """Tensors by full name; those of quantized linears are replaced by the weight (float32) that they stand for.

    Raises:
        ModelError, NumericsError: with the linear's name, see the formats.
    """
    from quantkit.grids.registry import dequantize  # imports torch, which `fit` does without

    tensors = dict(stored)
    for linear in linears:
        if linear.scheme is not None:
            packed = {name: tensors.pop(name) for name in packed_names(fmt, linear)}
            tensors[f"{linear.name}.weight"] = dequantize(unpacked(packed, linear, fmt))
    return tensors


def unpacked(stored: Mapping[str, Tensor], linear: LinearPlan, fmt: Format) -> QuantizedTensor:
    """What the tensors of a quantized linear (by full name) hold.

    Raises:
        ModelError, NumericsError: with the linear's name, see the formats.
    """
    assert linear.scheme is not None
    tensors = {name.removeprefix(f"{linear.name}."): tensor for name, tensor in stored.items()}
    try:
        return unpack(fmt, tensors, linear.scheme, (linear.out_features, linear.in_features))
    except QuantkitError as error:
        raise type(error)(f"{linear.name}: {error}") from error
