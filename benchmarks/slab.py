# SPDX-License-Identifier: Apache-2.0
"""A slab of a large model: a few layers of its real geometry with random weights, quantized as any model is.

    python benchmarks/slab.py deepseek-r1-32b --layers 3 --method awq --samples 128 --seqlen 2048 --device cuda:0
    python benchmarks/slab.py deepseek-r1-32b --layers 3 --folder SLAB --build     # or keep one, and start from it
    torchrun --nproc-per-node 2 benchmarks/slab.py deepseek-r1-32b --folder SLAB

prints, of the second layer (the first also compiles), the seconds of each stage beside what it cannot do without:
floating-point operations, and the share that they are of what the device does in one large product measured beside it,
or bytes; then one JSON document with all layers and the peaks of memory. Random weights say nothing about accuracy;
they take the same time.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.writer import write_json, write_shard
from quantkit.formats import FORMATS
from quantkit.hardware.machine import choose_device, versions
from quantkit.hardware.ranks import ALONE, Ranks, joined
from quantkit.methods.awq import POWERS, RATIO_POWERS, ROWS_JUDGED
from quantkit.methods.table import Options
from quantkit.model.config import config_from_dict
from quantkit.model.family import Site
from quantkit.model.sites import sites_of
from quantkit.model.skeleton import build
from quantkit.model.streaming import open_model
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import kinds
from quantkit.pipeline.memory import Allowance, keep, laid_out, lay_out_job
from quantkit.pipeline.run import run
from quantkit.pipeline.runtime import Runtime
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, resolver, shipped
from quantkit.settings.defaults import AskedScheme, choose_scheme
from quantkit.units import parse_bytes

CANDIDATES = 1 + len(POWERS) + len(RATIO_POWERS)  # scales that AWQ's search tries


class Clock:
    """Notes when each layer and stage begins; says it while it runs, unless it is quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.layers: list[float] = []
        self.stages: list[dict[str, float]] = []  # of each layer
        self.last: tuple[str, float] | None = None
        self.begun = 0.0

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None:
        """The run begins."""
        if not self.quiet:
            print(f"{layers} layers, {tokens} tokens, {dict(places)}", flush=True)

    def layer(self, index: int, stages: int) -> None:
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
        if not self.quiet:
            print(f"layer {index}: {self.layers[-1]:.2f} s, worst error {loss:.3%}", flush=True)

    def ending(self, name: str) -> None:
        """What comes after the layers."""


def make_slab(recipe: str, layers: int, vocabulary: int, folder: Path) -> None:
    """Write a model of the recipe's geometry with random BF16 weights, one shard a layer."""
    sizes = shipped()[recipe].config
    assert sizes is not None, f"{recipe} states no sizes"
    folder.mkdir(parents=True, exist_ok=True)
    config = sizes | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    architecture = build(config_from_dict(config))
    parts = [architecture.outside()]
    for index in range(layers):
        prefix = architecture.layer_name(index)
        parts.append({f"{prefix}.{name}": shape for name, shape in architecture.layer_shapes(index).items()})
    largest = max(math.prod(shape) for part in parts for shape in part.values())
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return numbers[: math.prod(shape)].view(shape)  # the same for all: more would only take longer to make

    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / file, {name: random(name, shape) for name, shape in part.items()})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)


class Floor(NamedTuple):
    """What a stage cannot do without: floating-point operations, and bytes of files."""

    operations: int = 0
    bytes: int = 0


def floors(job: Job, sites: tuple[Site, ...]) -> dict[str, Floor]:
    """Stage -> what it cannot do without, each thing done once; attention's own products are left out.

    calibrate: the linears of the site before, once for each stream; half of a symmetric product for the Gram matrix;
    the drift; at the last site the original's last linear. quantize: the factor; the correction by the drift; AWQ's
    candidates on the rows that judge them; GPTQ's updates; the refinement's first residual and rounds; the
    energy that the told error is a share of. run: the last site's linears
    """
    linears = job.plan.layer(0)
    tokens, beside = (0 if found is None else found.input_ids.numel() for found in (job.calibration, job.reference))
    found = {"read": Floor(bytes=2 * sum(x.out_features * x.in_features for x in linears.values()))}
    found["write"] = Floor(bytes=next(x for x in job.plan.shards if x.unit == "layer.0").tensor_bytes)
    run = 0  # for each token
    for site in sites:
        width = linears[site.linears[0]].in_features
        rows = [linears[name].out_features for name in site.linears]
        update = 2 * sum(rows) * width**2
        if tokens and job.method != "rtn":
            drift = min(2 * width**2, 4 * sum(rows) * width) if len(rows) == 1 else 2 * width**2
            summed = tokens * width**2 + beside * drift
            leaves = 2 * beside * sum(rows) * width if site is sites[-1] else 0
            found[f"calibrate {kinds(site)}"] = Floor((tokens + beside) * run + summed + leaves)
            judged = sum(min(count, ROWS_JUDGED) for count in rows)
            search = 2 * CANDIDATES * judged * width**2 if job.method == "awq" and site.fold else 0
            refine = update * (job.options.refine + 1)  # its last residual, or without it a product, gives the error
            solved = width**3 // 3 + (2 * update if beside else 0) + update // 2 + refine + update
            found[f"quantize {kinds(site)}"] = Floor(search + solved)
        run = 2 * sum(rows) * width
    return found | {"run the quantized": Floor(tokens * run)}


def peak(device: torch.device) -> float:
    """Operations a second of one large product, in the type that layers run in there."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        del product
    return 2 * size**3 / best


def table(stages: Mapping[str, float], counts: Mapping[str, Floor], fastest: float) -> str:
    """One line a stage: seconds, what was counted, and how near that comes to the device's peak."""
    lines = [f"{'stage':24} {'seconds':>8} {'Tflop':>8} {'of peak':>8} {'GB':>6}"]
    for name, seconds in stages.items():
        floor = counts.get(name, Floor())
        share = f"{floor.operations / fastest / seconds:.0%}" if floor.operations else ""
        operations = f"{floor.operations / 1e12:.2f}" if floor.operations else ""
        size = f"{floor.bytes / 1e9:.2f}" if floor.bytes else ""
        lines.append(f"{name:24} {seconds:8.3f} {operations:>8} {share:>8} {size:>6}")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is to be built and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--build", action="store_true", help="only build the slab in --folder")
    return parser.parse_args(words)


def main() -> None:
    """Build the slab, quantize it, print one JSON document."""
    said = arguments()
    if said.build:
        make_slab(said.recipe, said.layers, said.vocabulary, said.folder)
        return
    with tempfile.TemporaryDirectory() as scratch, joined(print) as ranks:
        folder = said.folder or Path(scratch) / "slab"
        if not (folder / "config.json").is_file():
            make_slab(said.recipe, said.layers, said.vocabulary, folder)
        out = Path(ranks.agree(str(Path(scratch) / "out")))  # of the first process
        document = measure(said, folder, out, ranks)
        ranks.wait()
    if ranks.first:
        print(document.pop("table"))
        print(json.dumps(document, indent=2))


def measure(said: argparse.Namespace, folder: Path, out: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Quantize the slab in `folder` without verification."""
    model = open_model(folder)
    scheme = choose_scheme(said.method, Recipe(), AskedScheme(4, 128))
    plan = make_plan(
        model, resolver(Recipe(), scheme, model.family.sixteen_bit), FORMATS["gptq" if said.method == "gptq" else "awq"]
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(said.vocabulary, (said.samples, said.seqlen), generator=generator)
    tokens = None if said.method == "rtn" else TokenSet(ids, "random", "random", "random")
    device = choose_device(said.device, ranks.local_rank if ranks.size > 1 else None)
    runtime = Runtime(model, device, out, ranks=ranks)
    job = Job(runtime, plan, said.method, Options(refine=said.refine), tokens)
    allowance = Allowance(
        vram=parse_bytes(said.vram, "--vram") if said.vram else None,
        ram=parse_bytes(said.ram, "--ram") if said.ram else None,
    )
    layout = lay_out_job(job, [], allowance)
    keep(layout, device)
    fastest = peak(device)
    clock = Clock(quiet=not ranks.first)
    began = time.perf_counter()
    outcome = run(laid_out(job, layout), clock)
    assert outcome is not None
    counts = floors(job, sites_of(model)[0])
    return {
        "recipe": said.recipe,
        "method": said.method,
        "refine": said.refine,
        "tokens": f"{said.samples} x {said.seqlen}",
        "processes": ranks.size,
        "seconds": time.perf_counter() - began,
        "seconds_per_layer": clock.layers,
        "stages": clock.stages,
        "counted": {name: floor._asdict() for name, floor in counts.items()},
        "peak_operations_per_second": fastest,
        "memory": layout.record(),
        "peak_device_gib": max(held for _, held in outcome.peaks) / 2**30,
        "peak_rss_gib": max(rss for rss, _ in outcome.peaks) / 2**30,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "table": table(clock.stages[:2][-1], counts, fastest * ranks.size),
    }


if __name__ == "__main__":
    main()
