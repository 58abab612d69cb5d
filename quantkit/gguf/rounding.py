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
from quantkit.model.families import Site
from quantkit.model.sites import sites_of
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    move_buffers,
    run_to,
)
from quantkit.pipeline.activations import Stream, regrouped
from quantkit.pipeline.forward import (
    Progress,
    advance,
    embed_original,
    layer_loaded,
    loaded,
    open_states,
    run_dtype,
)
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

    @property
    def dtype(self) -> torch.dtype:
        return run_dtype(self.model, self.device, f"{next(iter(self.types))}.weight")

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
    stream = open_states(model, job.calibration, job.dtype, job.device, job.out / ".calibration-states.tmp")
    progress.start(len(model.layers), stream.states.shape[0] * stream.states.shape[1], {"calibration": stream.place})
    embed_original(model, job.calibration, stream, job.device)
    for index in range(len(model.layers)):
        progress.layer(index)
        progress.stage("read")
        reused = f"layer.{index}" in journal.finished
        with layer_loaded(model, index, job.device, job.dtype) as layer:
            if not reused:
                blocks, records = _round_layer(job, index, sites, stream, progress)
                sha256 = write_shard(job.file(index), blocks)
                journal.append(Unit(f"layer.{index}", job.file(index).name, sha256, {"linears": records}))
            written = open_file(job.file(index))
            read = {name: dequantize_blocks(written.read(name), job.types[_linear(name)]) for name in written.entries}
            prefix = f"{model.layer_name(index)}."
            assign(layer, loaded({n.removeprefix(prefix): w for n, w in read.items()}, job.device, job.dtype))
            progress.stage("run the quantized")
            if index + 1 < len(model.layers):
                advance(model, index, stream)
        records = journal.finished[f"layer.{index}"].record["linears"]
        progress.finished(index, max((record["loss"] for record in records), default=0.0), reused)
    return [record for unit in journal.finished.values() for record in unit.record["linears"]]


def _linear(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _round_layer(
    job: RoundJob, index: int, sites: Iterable[Site], stream: Stream, progress: Progress
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Blocks by parameter name, and a record for each linear."""
    layer, prefix = job.model.layers[index], job.model.layer_name(index)
    blocks: dict[str, Tensor] = {}
    records = []
    for site in sites:
        progress.stage("calibrate")
        stats = _collect(job, index, site.linears[0], stream)
        require_finite_stats(stats, f"{prefix}.{site.linears[0]}")
        progress.stage("quantize")
        factor = None if job.nearest else gptq.factorize(stats.gram, damp=job.damp)
        for local in site.linears:
            weight = layer.get_submodule(local).weight
            assert isinstance(weight, Tensor)
            kind = job.types[f"{prefix}.{local}"]
            packed = round_linear(weight.float(), kind, stats.gram, factor)
            blocks[f"{prefix}.{local}.weight"] = packed.cpu()
            found = dequantize_blocks(packed, kind)
            whole = float(output_error(weight, stats.gram).sum())
            lost = float(output_error(found - weight.float(), stats.gram).sum())
            records.append(_record(f"{prefix}.{local}", index, kind, weight, lost / whole if whole > 0 else 0.0))
            assign(layer, loaded({f"{local}.weight": found}, job.device, job.dtype))
    return blocks, records


def _collect(job: RoundJob, index: int, local: str, stream: Stream) -> SiteStats:
    weight = job.model.layers[index].get_submodule(local).weight
    assert isinstance(weight, Tensor)
    inputs = regrouped(_inputs(job, index, local, stream), samples_per_sum(stream.states.shape[1]))
    return collect(inputs, weight.shape[1], job.device)


def _inputs(job: RoundJob, index: int, local: str, stream: Stream) -> Iterator[Tensor]:
    """What the site's linears read, one micro-batch at a time."""
    for batch in stream.batches():
        yield run_to(job.model, index, stream.states[batch].to(job.device), local)


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
