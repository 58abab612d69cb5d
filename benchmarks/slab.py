# SPDX-License-Identifier: Apache-2.0
"""A slab of a large model: a few layers of its real geometry with random weights, quantized as any model is.

    python benchmarks/slab.py deepseek-r1-32b --layers 2 --method awq --samples 128 --seqlen 2048 --device cuda:0

prints seconds per layer and stage, the operations and bytes that a layer cannot do without, and the peaks of memory.
Random weights say nothing about accuracy; they take the same time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration import TokenSet
from quantkit.checkpoint.writer import write_json, write_shard
from quantkit.choices import choose_scheme
from quantkit.formats import FORMATS
from quantkit.job import Job
from quantkit.machine import choose_device, peak_device_bytes, peak_rss_bytes, versions
from quantkit.memory import keep, laid_out, lay_out_job
from quantkit.model.config import config_from_dict
from quantkit.model.streaming import build, open_model
from quantkit.pipeline import run
from quantkit.plan import Plan, make_plan
from quantkit.quantize.methods import Options
from quantkit.quantize.refine import SWEEPS
from quantkit.recipe import Recipe, resolver, shipped
from quantkit.units import parse_bytes


class Clock:
    """Notes when each layer and stage begins; says it while it runs."""

    def __init__(self) -> None:
        self.layers: list[float] = []
        self.stages: list[dict[str, float]] = []  # of each layer
        self.last: tuple[str, float] | None = None
        self.begun = 0.0

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None:
        """The run begins."""
        print(f"{layers} layers, {tokens} tokens, {dict(places)}", flush=True)

    def layer(self, index: int) -> None:
        """A layer begins."""
        self.begun = time.perf_counter()
        self.stages.append({})

    def stage(self, name: str) -> None:
        """A stage begins: the one before it ends."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last and self.stages:
            self.stages[-1][self.last[0]] = self.stages[-1].get(self.last[0], 0.0) + now - self.last[1]
        self.last = (name, now)

    def finished(self, index: int, loss: float, reused: bool) -> None:
        """A layer is done."""
        self.stage("between layers")
        self.layers.append(time.perf_counter() - self.begun)
        print(f"layer {index}: {self.layers[-1]:.2f} s, worst error {loss:.3%}", flush=True)

    def ending(self, name: str) -> None:
        """What comes after the layers."""


def make_slab(recipe: str, layers: int, vocabulary: int, folder: Path) -> None:
    """Write a model of the recipe's geometry with random BF16 weights, one shard a layer."""
    sizes = shipped()[recipe].config
    assert sizes is not None, f"{recipe} states no sizes"
    config = sizes | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    architecture = build(config_from_dict(config))
    generator = torch.Generator().manual_seed(0)

    def random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    parts = [architecture.outside()]
    for index in range(layers):
        prefix = architecture.layer_name(index)
        parts.append({f"{prefix}.{name}": shape for name, shape in architecture.layer_shapes(index).items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / file, {name: random(name, shape) for name, shape in part.items()})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)


def counted(plan: Plan, tokens: int, refine: int) -> dict[str, int]:
    """Operations and bytes of one layer, each done once: the floor that its stages can be held against.

    forward: of its linears over the calibration tokens; gram: half of each site's symmetric product; factorise; round:
    GPTQ's updates; refine: the first residual, and the updates of each sweep and refit; read, written: bytes
    """
    linears = [linear for linear in plan.linears if linear.layer == 0]
    sites = {linear.in_features: 0 for linear in linears} | {linears[0].in_features: 3}  # q/k/v, o, gate/up
    squares = sum(max(1, times) * width**2 for width, times in sites.items())
    updates = sum(2 * linear.out_features * linear.in_features**2 for linear in linears)
    return {
        "forward": 2 * tokens * sum(linear.out_features * linear.in_features for linear in linears),
        "gram": tokens * squares,
        "factorise": sum(max(1, times) * width**3 // 3 for width, times in sites.items()),
        "round": updates // 2,
        "refine": updates * (refine * (SWEEPS + 1) + 2 if refine else 0),
        "bytes_read": 2 * sum(linear.out_features * linear.in_features for linear in linears),
        "bytes_written": plan.shards[1].tensor_bytes,
    }


def main() -> None:
    """Build the slab, quantize it, print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--method", choices=["awq", "gptq", "rtn"], default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--refine", type=int, default=Options.refine)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vram", help="keep to so much GPU memory, such as 22GiB")
    parser.add_argument("--ram", help="keep to so much RAM, such as 16GiB")
    parser.add_argument("--folder", type=Path, help="keep the slab here, and use it if it is there")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = said.folder or Path(scratch) / "slab"
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True)
            make_slab(said.recipe, said.layers, said.vocabulary, folder)
        print(json.dumps(measure(said, folder, Path(scratch) / "out"), indent=2))


def measure(said: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """Quantize the slab in `folder` without verification."""
    model = open_model(folder)
    scheme = choose_scheme(said.method, Recipe(), 4, 128, None)
    plan = make_plan(model, resolver(Recipe(), scheme), FORMATS["gptq" if said.method == "gptq" else "awq"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(said.vocabulary, (said.samples, said.seqlen), generator=generator)
    tokens = None if said.method == "rtn" else TokenSet(ids, "random", "random", "random")
    device = choose_device(said.device)
    job = Job(model, plan, said.method, Options(refine=said.refine), tokens, None, out, device)
    layout = lay_out_job(
        job,
        [],
        vram=parse_bytes(said.vram, "--vram") if said.vram else None,
        ram=parse_bytes(said.ram, "--ram") if said.ram else None,
    )
    keep(layout, device)
    clock = Clock()
    began = time.perf_counter()
    run(laid_out(job, layout), clock)
    return {
        "recipe": said.recipe,
        "method": said.method,
        "refine": said.refine,
        "tokens": f"{said.samples} x {said.seqlen}",
        "seconds": time.perf_counter() - began,
        "seconds_per_layer": clock.layers,
        "stages": clock.stages,
        "counted": counted(plan, 0 if tokens is None else ids.numel(), said.refine),
        "memory": layout.record(),
        "peak_device_gib": peak_device_bytes(device) / 2**30,
        "peak_rss_gib": peak_rss_bytes() / 2**30,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
