# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random integers and no trace of quantkit, and what their linears hold."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.commands.conversion import ConvertRequest
from quantkit.commands.convert import convert
from quantkit.commands.quantize import quantize
from quantkit.formats import FORMATS, QuantizedLayer
from quantkit.formats.reading import unpack
from quantkit.model.family import FUSED
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import QuantizedTensor, Scheme
from quantkit.settings.request import Request
from tests.conftest import make_qwen2
from tests.tiny import load_whole

QUIET = Terminal(quiet=True)
W4 = Scheme(4, 32, False)


def run(model: Path, out: Path, **said: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "method": "rtn",
        "group_size": 32,
        "offline": True,
        "verify": False,
        "max_ppl_increase": 9.0,
    }
    return quantize(Request(model=str(model), command="quantkit rtn", out=out, **(fixed | said)), QUIET)[0].content()


def to(folder: Path, target: str, out: Path, **said: Any) -> dict[str, Any]:
    command = f"quantkit convert {folder} --to {target}"
    return convert(ConvertRequest(source=str(folder), to=target, command=command, out=out, **said), QUIET)[0].content()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


Change = Callable[[str, QuantizedTensor], QuantizedTensor]


def foreign(
    folder: Path,
    fmt: str = "awq",
    scheme: Scheme = W4,
    *,
    config: dict[str, Any] | None = None,
    change: Change = lambda name, quantized: quantized,
    schemes: dict[str, Scheme] | None = None,
    kept: tuple[str, ...] = (),
    head: bool = False,
    **sizes: Any,
) -> dict[str, QuantizedTensor]:
    """A checkpoint with random integers and no trace of quantkit; what its linears hold."""
    make_qwen2(folder, **sizes)
    model = load_whole(folder)
    state = {name: tensor.bfloat16() for name, tensor in tensors(folder).items()}
    for path in folder.glob("model*"):
        path.unlink()
    generator = torch.Generator().manual_seed(3)
    held: dict[str, QuantizedTensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or name != "lm_head") and name not in kept:
            own = (schemes or {}).get(name.rpartition(".")[2], scheme)
            shape = tuple(module.weight.shape)
            groups = (shape[0], own.groups(shape[1]))
            codes = torch.randint(0, own.max_code + 1, shape, generator=generator, dtype=torch.uint8)
            zeros = torch.randint(1, own.max_code + 1, groups, generator=generator, dtype=torch.uint8)
            zeros = torch.full_like(zeros, own.middle) if own.symmetric else zeros
            scales = (0.001 + 0.01 * torch.rand(groups, generator=generator)).half()
            held[name] = change(name, QuantizedTensor(codes, scales, zeros, own))
            state.pop(f"{name}.weight")
            state |= {f"{name}.{key}": tensor for key, tensor in FORMATS[fmt].pack(held[name]).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    layers = [QuantizedLayer(name, quantized.scheme) for name, quantized in held.items()]
    said = config or FORMATS[fmt].config(layers, [*kept, *([] if head else ["lm_head"])], FUSED)
    if fmt.startswith("gptq") and any(quantized.g_idx is not None for quantized in held.values()):
        said["desc_act"] = True
    edit(folder, lambda raw: raw.update(quantization_config=said))
    return held


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = tensors(folder)
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def unpacked(folder: Path, name: str, fmt: str, scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    packed = {k.removeprefix(f"{name}."): t for k, t in tensors(folder).items() if k.startswith(f"{name}.")}
    return unpack(FORMATS[fmt], packed, scheme, shape)


def assert_held(folder: Path, fmt: str, held: dict[str, QuantizedTensor]) -> None:
    """Every linear of the folder, unpacked, is what is expected."""
    for name, expected in held.items():
        found = unpacked(folder, name, fmt, expected.scheme, (expected.out_features, expected.in_features))
        for key in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(found, key), getattr(expected, key)), (name, key)
        if expected.g_idx is None:
            assert found.g_idx is None
        else:
            assert found.g_idx is not None
            assert torch.equal(found.g_idx, expected.g_idx.int())


def shuffled(name: str, quantized: QuantizedTensor) -> QuantizedTensor:
    """Act-order: each column in a group of its own choosing."""
    generator = torch.Generator().manual_seed(len(name))
    order = torch.randperm(quantized.in_features, generator=generator)
    return replace(quantized, g_idx=(order // quantized.scheme.group_size).int())
