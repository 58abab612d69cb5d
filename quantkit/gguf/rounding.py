# SPDX-License-Identifier: Apache-2.0
"""A 16-bit model rounded straight into GGUF's blocks, one decoder layer at a time.

The loop is that of `pipeline.run`: each site sees the inputs that the sites and layers before it, quantized, give it,
sums their Gram matrix, and rounds. There is no scale to fold and no other format between: what the codes are chosen on
are the grids that llama.cpp will compute with. A finished layer is a finished file with its hash in the journal.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import write_shard
from quantkit.formats.blocks import dequantize_blocks, pack, pack_superblocks, settle
from quantkit.formats.gguf import K_TYPES, TYPES
from quantkit.gguf.architecture import permutation, rope_factors
from quantkit.gguf.export import Layout, encode_rows, read_rows
from quantkit.gguf.file import TensorInfo, write_gguf
from quantkit.hardware.batching import samples_per_sum
from quantkit.methods import gptq, rtn
from quantkit.methods.refine import refine
from quantkit.model.sites import sites_of
from quantkit.model.streaming import StreamedModel, move_buffers, run_to
from quantkit.pipeline.activations import Stream, regrouped
from quantkit.pipeline.forward import Layer, embed_original, open_states
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.walk import walk
from quantkit.scheme import NAMED, Scheme
from quantkit.stats import SiteStats, collect, output_error, require_finite_stats

REFINEMENTS = 4


@dataclass(frozen=True)
class RoundJob:
    """types: full name of each linear -> its type; nearest: without error compensation"""

    model: StreamedModel
    layout: Layout
    types: Mapping[str, str]
    calibration: TokenSet
    device: torch.device
    out: Path
    nearest: bool = False
    damp: float = 0.01

    def file(self, index: int) -> Path:
        """Where the blocks of a layer are until the whole file is written."""
        return self.out / f"model-layer-{index:05d}.safetensors"


@torch.no_grad()
def round_layers(job: RoundJob, journal: Journal, progress: Progress) -> list[dict[str, Any]]:
    """Round every layer that is not finished, and return a record for each linear.

    Raises:
        NumericsError: weights or activations that are not finite. OutputError: the folder cannot be written.
    """
    model = job.model
    sites = sites_of(model)
    for index in range(len(model.layers)):
        unit = journal.finished.get(f"layer.{index}")
        if unit is not None and not journal.verify_unit(unit):
            journal.drop_from(unit.unit)
    move_buffers(model.model, job.device)
    runtime = Runtime(model, job.device, job.out)
    stream = open_states(runtime, job.calibration, "calibration")
    progress.start(len(model.layers), stream.states.shape[0] * stream.states.shape[1], {"calibration": stream.place})
    embed_original(runtime, job.calibration, stream)
    with walk(runtime, progress, sites=sites) as layers:
        for layer in layers:
            unit_name = f"layer.{layer.index}"
            reused = unit_name in journal.finished
            if not reused:
                blocks, records = _round_layer(job, layer, stream)
                sha256 = write_shard(job.file(layer.index), blocks)
                journal.append(Unit(unit_name, job.file(layer.index).name, sha256, {"linears": records}))
            written = open_file(job.file(layer.index))
            read = {name: dequantize_blocks(written.read(name), job.types[_linear(name)]) for name in written.entries}
            layer.load({name.removeprefix(f"{layer.name}."): weight for name, weight in read.items()})
            progress.stage("run the quantized")
            if layer.index + 1 < len(model.layers):
                layer.advance(stream)
            records = journal.finished[unit_name].record["linears"]
            progress.finished(layer.index, max((record["loss"] for record in records), default=0.0), reused)
    return [record for unit in journal.finished.values() for record in unit.record["linears"]]


def _linear(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _round_layer(job: RoundJob, layer: Layer, stream: Stream) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Blocks by parameter name, and a record for each linear."""
    blocks: dict[str, Tensor] = {}
    records = []
    for site in layer.sites:
        layer.progress.stage("calibrate")
        stats = _collect(layer, site.linears[0], stream)
        require_finite_stats(stats, f"{layer.name}.{site.linears[0]}")
        layer.progress.stage("quantize")
        factor = None if job.nearest else gptq.factorize(stats.gram, damp=job.damp)
        for local in site.linears:
            weight = layer.module.get_submodule(local).weight
            assert isinstance(weight, Tensor)
            name = f"{layer.name}.{local}"
            kind = job.types[name]
            packed = round_linear(weight.float(), kind, stats.gram, factor)
            blocks[f"{name}.weight"] = packed.cpu()
            found = dequantize_blocks(packed, kind)
            whole = float(output_error(weight, stats.gram).sum())
            lost = float(output_error(found - weight.float(), stats.gram).sum())
            records.append(_record(name, layer.index, kind, weight, lost / whole if whole > 0 else 0.0))
            layer.load({f"{local}.weight": found})
    return blocks, records


def _collect(layer: Layer, local: str, stream: Stream) -> SiteStats:
    """Sum up what a linear reads, one micro-batch at a time."""
    runtime = layer.runtime
    weight = layer.module.get_submodule(local).weight
    assert isinstance(weight, Tensor)
    batches = (stream.states[batch].to(runtime.device) for batch in stream.batches())
    inputs = (run_to(runtime.model, layer.index, hidden, local) for hidden in batches)
    return collect(regrouped(inputs, samples_per_sum(stream.states.shape[1])), weight.shape[1], runtime.device)


def round_linear(weight: Tensor, kind: str, gram: Tensor, factor: gptq.Factor | None) -> Tensor:
    """weight [out, in] -> blocks uint8 [out, row bytes], judged by the Gram matrix of its inputs.

    factor: None rounds to nearest, on grids that weigh each column by its energy.
    """
    energy = gram.diagonal()
    if kind in K_TYPES:
        scheme = NAMED[kind]
        if factor is None:
            return pack_superblocks(rtn.quantize(weight, scheme, energy=energy))
        return pack_superblocks(gptq.quantize(weight, scheme, factor, energy=energy))
    scheme = Scheme(8 if kind == "q8_0" else 4, 32, kind != "q4_1")
    if factor is None:
        return pack(rtn.quantize(weight, scheme, energy=energy), kind, exact=False)
    once = gptq.quantize(weight, scheme, factor, energy=energy)
    refined, _ = refine(weight, once, gram, damp=factor.damp, rounds=REFINEMENTS)
    return pack(settle(refined), kind)


def _record(name: str, index: int, kind: str, weight: Tensor, loss: float) -> dict[str, Any]:
    rows, columns = weight.shape
    scheme = NAMED[kind]
    return {
        "name": name,
        "layer": index,
        "kind": name.rpartition(".")[2],
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "method": kind,
        "out_features": rows,
        "in_features": columns,
        "bytes": rows * TYPES[kind].row_bytes(columns),
        "loss": loss,
    }


def assemble(job: RoundJob, destination: Path) -> str:
    """Write the file from the layers' blocks, and what is not quantized from the model; return its sha256."""
    return write_gguf(
        destination,
        job.layout.metadata,
        job.layout.infos,
        ((info.name, _pieces(job, job.layout.sources[info.name], info)) for info in job.layout.infos),
    )


def _pieces(job: RoundJob, parameter: str, info: TensorInfo) -> Iterator[Tensor]:
    settings = job.model.config
    if not parameter:
        factors = rope_factors(settings)
        assert factors is not None
        yield factors
        return
    order = permutation(settings, parameter, info.shape[0])
    if _linear(parameter) in job.types:
        layer = int(parameter.removeprefix(f"{job.model.layers_name}.").partition(".")[0])
        parts: Iterable[Tensor] = [open_file(job.file(layer)).read(parameter)]
    else:
        parts = (encode_rows(parameter, rows, info.type) for rows in read_rows(job.model.checkpoint, parameter))
    for part in parts:
        yield part if order is None else part[order]
