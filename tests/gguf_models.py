# SPDX-License-Identifier: Apache-2.0
"""What the tests of GGUF share: tiny models with a tokenizer, and blocks as the `gguf` package reads them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

import quantkit
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import QuantizedTensor, Scheme
from tests.conftest import make_qwen2

DEMO = Path(quantkit.__file__).parent / "demo"
QUIET = Terminal(quiet=True)
INTEGERS = {"q4_0": Scheme(4, 32, True), "q4_1": Scheme(4, 32, False), "q8_0": Scheme(8, 32, True)}


def random_integers(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.05 - 0.01).to(torch.float16)
    zeros = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, zeros, scheme)


def by_the_package(blocks: Tensor, name: str) -> Tensor:
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()]))


def tiny(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model that K-quants can hold, with the demo's tokenizer."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 4096 + 8, "num_hidden_layers": 2, "max_position_embeddings": 128}  # fmt: skip
    if kind == "qwen2":
        make_qwen2(folder, **(sizes | {"num_hidden_layers": 2, "layers": 2} | changes))
    else:
        from transformers import Qwen3ForCausalLM

        torch.manual_seed(1)
        classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        config, model = classes[kind]
        built = model(config(**(sizes | {"head_dim": 64} | changes)))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        built.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def as_transformers_reads(path: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    assert isinstance(logits, Tensor)
    return logits


def as_the_model_with(weights: dict[str, Tensor], folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        logits = model(ids).logits
    assert isinstance(logits, Tensor)
    return logits


IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def parameter_names(original: Any) -> list[str]:
    layers = [f"{original.layer_name(i)}.{n}" for i in range(2) for n in original.layer_shapes(i)]
    return [*original.outside(), *layers]


class Watching:
    """A progress that notes what was taken from the disk, and may stop the work before a layer."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.reused = stop, [False, False]

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None: ...
    def stage(self, name: str) -> None: ...
    def ending(self, name: str) -> None: ...
    def layer(self, index: int, stages: int) -> None:
        if index == self.stop:
            raise KeyboardInterrupt

    def finished(self, index: int, loss: float, reused: bool) -> None:
        self.reused[index] = reused
