# SPDX-License-Identifier: Apache-2.0
"""A GGUF file measured against the model that it was made from: its tensors under the model's own names.

What is read are the values that llama.cpp computes with; the order of q and k rows is put back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantkit.checkpoint.reader import is_plain_name
from quantkit.errors import ModelError
from quantkit.formats.gguf import TYPES
from quantkit.gguf.architecture import ARCHITECTURES, permutation, tensor_name
from quantkit.gguf.file import GGUFFile, open_gguf
from quantkit.model.streaming import Architecture
from quantkit.plan import OUTSIDE, LinearPlan
from quantkit.scheme import NAMED
from quantkit.serving.fit import Stored


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file of a known architecture. linears: those of the decoder layers, in order, and a quantized head."""

    file: GGUFFile
    config: PretrainedConfig
    linears: tuple[LinearPlan, ...]

    @property
    def directory(self) -> Path:
        return self.file.path.parent

    @property
    def files(self) -> list[str]:
        return [self.file.path.name]

    @property
    def decoder(self) -> tuple[LinearPlan, ...]:
        """The linears of the decoder layers."""
        return tuple(linear for linear in self.linears if linear.layer != OUTSIDE)

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameters by the model's names, float32, dequantized."""
        return {name: self._read(name).to(device) for name in names}

    def _read(self, name: str) -> Tensor:
        values = self.file.read(tensor_name(name))
        order = permutation(self.config, name, len(values))
        return values if order is None else torch.empty_like(values).index_copy_(0, order, values)

    @property
    def bits_per_weight(self) -> float:
        """Every stored bit of the quantized linears over their weights."""
        infos = [self.file.infos[tensor_name(f"{x.name}.weight")] for x in self.linears if x.scheme is not None]
        weights = sum(info.shape[0] * info.shape[1] for info in infos)
        return 8 * sum(info.nbytes for info in infos) / weights

    def stored(self) -> Stored:
        """What `fit` counts."""
        names = {tensor_name(name): name for name in self._parameters()}
        tensors = {names.get(name, name): info.nbytes for name, info in self.file.infos.items()}
        head = tuple(linear for linear in self.linears if linear.layer == OUTSIDE)
        return Stored(tensors, self.file.path.stat().st_size, self.decoder, "gguf", head=head)

    def _parameters(self) -> list[str]:
        inner = [f"{linear.name}.{key}" for linear in self.decoder for key in ("weight", "bias")]
        prefix = self.linears[0].name.split(".layers.")[0]
        norms = [f"{prefix}.layers.{i}.{n}.weight" for i in range(self.config.num_hidden_layers) for n in NORMS]
        return [*inner, *norms, f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight", "lm_head.weight"]


NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def find_gguf(folder: Path, recorded: Mapping[str, Any] | None) -> Path | None:
    """The GGUF file that a folder is about: the one its run names, or its only one, if it holds no other weights.

    recorded: the folder's quantkit.json; None: it has none
    """
    named = ((recorded or {}).get("gguf") or {}).get("file")
    if isinstance(named, str) and is_plain_name(named):
        return folder / named
    files = sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not any(folder.glob("*.safetensors")) else None


def open_gguf_model(path: Path, architecture: Architecture) -> GGUFModel:
    """Read the header of a file and hold it against the model that it was made from.

    Raises:
        ModelError: a damaged file, or one of another model.
    """
    file, config = open_gguf(path), architecture.config
    arch = file.metadata.get("general.architecture")
    if config.model_type not in ARCHITECTURES or arch != ARCHITECTURES[config.model_type]:
        raise ModelError(f"{path}: architecture {arch!r:.40}; the original is a {config.model_type}")
    linears = []
    for index, layer in enumerate(architecture.layers):
        for local, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                name = f"{architecture.layer_name(index)}.{local}"
                kind = _checked(file, f"{name}.weight", (module.out_features, module.in_features))
                scheme = NAMED.get(kind)
                linears.append(LinearPlan(name, index, local, module.out_features, module.in_features, scheme))
    head = architecture.head_name
    for name, shape in architecture.outside().items():
        scheme = NAMED.get(_checked(file, name, shape))
        if head and scheme is not None and name == f"{head}.weight":
            linears.append(LinearPlan(head, OUTSIDE, head, shape[0], shape[1], scheme))
    return GGUFModel(file, config, tuple(linears))


def _checked(file: GGUFFile, name: str, shape: tuple[int, ...]) -> str:
    info = file.infos.get(tensor_name(name))
    if info is None or info.shape != shape:
        found = "none" if info is None else list(info.shape)
        raise ModelError(f"{file.path}: {tensor_name(name)}: expected {list(shape)}, got {found}; is it another model?")
    assert info.type in TYPES
    return info.type
