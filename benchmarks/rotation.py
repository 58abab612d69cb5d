# SPDX-License-Identifier: Apache-2.0
"""The same model in rotated coordinates, to see what quantizing it there wins: QuaRot's R1 and R2 (arXiv 2404.00456).

    python benchmarks/rotation.py MODEL OUT [--heads]
    quantkit gptq OUT --calib CALIB.safetensors --eval EVAL.safetensors     and the same of MODEL

The weights of the norms are multiplied into the linears that read them, and the residual stream is turned by a random
Hadamard matrix (any orthogonal one where the width is no power of two): embeddings, what reads the stream and what
writes to it. `--heads` turns the values of each attention head as well. OUT holds float32 and computes what MODEL does;
nothing changes at run time. For Llama, Mistral, Qwen2 and Qwen3.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.model.streaming import StreamedModel, open_model, read_layer, read_outside

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix [width, width], float64."""
    generator = torch.Generator().manual_seed(seed)
    if width & (width - 1):
        any_matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        orthogonal: Tensor = torch.linalg.qr(any_matrix).Q
        return orthogonal
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = 1 - 2 * torch.randint(2, (width, 1), generator=generator).double()
    return (signs * matrix).div_(width**0.5)


def rotated_layer(model: StreamedModel, index: int, stream: Tensor, head: Tensor | None) -> dict[str, Tensor]:
    """A layer that reads and writes the rotated stream; head: the rotation of each head's values."""
    tensors = {name: tensor.double() for name, tensor in read_layer(model, index).items()}
    for norm, readers in READERS.items():
        for name in readers:
            tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] * tensors[f"{norm}.weight"]) @ stream
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
    for name in WRITERS:
        tensors[f"{name}.weight"] = stream.T @ tensors[f"{name}.weight"]
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = stream.T @ tensors[f"{name}.bias"]
    if head is not None:
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if name in tensors:
                values = tensors[name].unflatten(0, (-1, len(head)))  # [KV heads, head_dim, ...]
                tensors[name] = torch.einsum("hd...,de->he...", values, head).flatten(0, 1)
        outputs = tensors["self_attn.o_proj.weight"].unflatten(1, (-1, len(head)))  # [hidden, heads, head_dim]
        tensors["self_attn.o_proj.weight"] = (outputs @ head).flatten(1)
    return tensors


def main() -> None:
    """Read, rotate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", action="store_true", help="rotate the values of each head too")
    said = parser.parse_args()
    model = open_model(said.model)
    config = model.config
    stream = rotation(config.hidden_size, 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = rotation(head_dim, 1) if said.heads else None
    outside = {name: tensor.double() for name, tensor in read_outside(model).items()}
    embedding = outside["model.embed_tokens.weight"]
    readout = outside.get("lm_head.weight", embedding) * outside["model.norm.weight"]
    tensors = {"model.embed_tokens.weight": embedding @ stream, "lm_head.weight": readout @ stream}
    tensors["model.norm.weight"] = torch.ones_like(outside["model.norm.weight"])
    for index in range(len(model.layers)):
        layer = rotated_layer(model, index, stream, head)
        tensors |= {f"{model.layer_name(index)}.{name}": tensor for name, tensor in layer.items()}
    said.out.mkdir(parents=True)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, said.out / "model.safetensors")
    for path in said.model.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copyfile(path, said.out / path.name)
    changed = {"tie_word_embeddings": False, "torch_dtype": "float32", "dtype": "float32"}
    (said.out / "config.json").write_text(json.dumps(json.loads((said.model / "config.json").read_text()) | changed))


if __name__ == "__main__":
    main()
