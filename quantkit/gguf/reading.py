# SPDX-License-Identifier: Apache-2.0
"""A GGUF file measured against the model that it was made from: its tensors under the model's own names.

What is read are the values that llama.cpp computes with; the order of q and k rows is put back.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import is_plain_name
from quantkit.errors import ModelError
from quantkit.formats.gguf import GGUF, scheme_of_type
from quantkit.gguf.architecture import permutation, tensor_name
from quantkit.gguf.file import GGUFFile, open_gguf
from quantkit.model.shapes import Shapes
from quantkit.plan import OUTSIDE, LinearPlan, decoder_linears, head_linear
from quantkit.quantized import parameters
from quantkit.records import Result
from quantkit.serving.stored import Stored

SUFFIX = ".gguf"
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
MERGE = "merge them first: llama-gguf-split --merge {} whole.gguf"
MOST_NAMES = 6  # in a message


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file of a known architecture. linears: those of the decoder layers, in order, and a quantized head."""

    file: GGUFFile
    model: Shapes
    linears: tuple[LinearPlan, ...]

    @property
    def directory(self) -> Path:
        return self.file.path.parent

    @property
    def files(self) -> list[str]:
        return [self.file.path.name]

    @property
    def format_name(self) -> str:
        """As `--format` says it."""
        return GGUF.name

    @property
    def decoder(self) -> tuple[LinearPlan, ...]:
        """The linears of the decoder layers."""
        return tuple(linear for linear in self.linears if linear.layer != OUTSIDE)

    @property
    def served(self) -> None:
        """A .gguf does not say what it is computed in."""

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters by the model's names, float32, dequantized."""
        return {name: self._read(name).to(device) for name in names}

    def _read(self, name: str) -> Tensor:
        values = self.file.read(tensor_name(self.model, name))
        order = permutation(self.model, name, len(values))
        return values if order is None else torch.empty_like(values).index_copy_(0, order, values)

    @property
    def bits_per_weight(self) -> float:
        """Every stored bit of the quantized linears over their weights."""
        quantized = [f"{linear.name}.weight" for linear in self.linears if linear.scheme is not None]
        infos = [self.file.infos[tensor_name(self.model, name)] for name in quantized]
        weights = sum(info.shape[0] * info.shape[1] for info in infos)
        return 8 * sum(info.nbytes for info in infos) / weights

    def stored(self) -> Stored:
        """What `fit` counts."""
        names = {tensor_name(self.model, name): name for name in parameters(self.model)}
        tensors = {names.get(name, name): info.nbytes for name, info in self.file.infos.items()}
        head = tuple(linear for linear in self.linears if linear.layer == OUTSIDE)
        return Stored(tensors, self.file.path.stat().st_size, self.decoder, GGUF.name, head=head)


def find_gguf(where: Path, recorded: Result | None) -> Path | None:
    """The GGUF file that a path is about: itself, the one that a folder's run names, or a folder's only weights.

    recorded: the folder's quantkit.json; None: it has none

    Raises:
        ModelError: a folder with several such files and no other weights.
    """
    if where.is_file():
        return where if where.suffix == SUFFIX else None
    if recorded and recorded.gguf and is_plain_name(recorded.gguf.file):
        return where / recorded.gguf.file
    files = sorted(where.glob(f"*{SUFFIX}"))
    if not files or any(where.glob("*.safetensors")):
        return None
    if len(files) > 1:
        parts = [path for path in files if SPLIT.search(path.name)]
        names = ", ".join(path.name for path in files[:MOST_NAMES]) + (" ..." if len(files) > MOST_NAMES else "")
        hint = f"{MERGE.format(parts[0])}" if len(parts) == len(files) else f"name one of them: {files[0]}"
        what = "one model in parts" if len(parts) == len(files) else "several models"
        raise ModelError(f"{where}: {len(files)} .gguf files, {what} ({names}); {hint}")
    return files[0]


def open_gguf_model(path: Path, model: Shapes) -> GGUFModel:
    """Read the header of a file and hold it against the model that it was made from.

    Raises:
        ModelError: a damaged file, or one of another model.
    """
    file, gguf = open_gguf(path), model.family.gguf
    if SPLIT.search(path.name) or file.metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(f"{path}: one of several parts of a model; {MERGE.format(path)}")
    arch = file.metadata.get("general.architecture")
    if gguf is None or arch != gguf.name:
        raise ModelError(f"{path}: architecture {arch!r:.40}; the original is a {model.config.model_type}")
    for name, shape in parameters(model).items():
        _check(file, model, name, shape)

    def stored(linear: LinearPlan) -> LinearPlan:
        kind = file.infos[tensor_name(model, f"{linear.name}.weight")].type
        return replace(linear, scheme=scheme_of_type(kind))

    head = head_linear(model)
    head = head and stored(head)
    linears = [stored(linear) for linear in decoder_linears(model)]
    return GGUFModel(file, model, (*linears, *([head] if head and head.scheme is not None else [])))


def _check(file: GGUFFile, model: Shapes, name: str, shape: tuple[int, ...]) -> None:
    stored = tensor_name(model, name)
    info = file.infos.get(stored)
    if info is None or info.shape != shape:
        found = "none" if info is None else list(info.shape)
        raise ModelError(f"{file.path}: {stored}: expected {list(shape)}, got {found}; is it another model?")
