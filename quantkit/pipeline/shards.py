# SPDX-License-Identifier: Apache-2.0
"""The shards of a run: what goes into each, and what it stands for when it is read back."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import write_pieces, write_shard
from quantkit.dtypes import as_served, dtype_name, to_stored
from quantkit.errors import OutputError
from quantkit.model.streaming import read_outside
from quantkit.pipeline.forward import Layer
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import LayerResult
from quantkit.plan import COPIED, ShardPlan
from quantkit.quantized import dequantized


def copy_outside(job: Job, journal: Journal, shard: ShardPlan) -> None:
    """Write a shard of tensors outside the layers as they are, if it is not finished."""
    runtime = job.runtime
    if shard.unit not in journal.finished and runtime.ranks.first:
        tensors = read_outside(runtime.model, shard.tensors)
        stored = {name: to_stored(name, tensor) for name, tensor in tensors.items()}
        write(journal, shard, lambda: stored, [])
    runtime.ranks.wait()  # the others read it


def copy_through(job: Job, journal: Journal) -> None:
    """Write the shard of what is no part of the text decoder byte for byte, if there is one that is not finished."""
    runtime = job.runtime
    shard = next((shard for shard in job.plan.shards if shard.unit == COPIED), None)
    if shard is not None and shard.unit not in journal.finished and runtime.ranks.first:
        specs = {name: (spec.dtype, spec.shape) for name, spec in shard.tensors.items()}
        sha256 = write_pieces(journal.folder / shard.file, specs, runtime.model.checkpoint.pieces)
        journal.append(Unit(shard.unit, shard.file, sha256, {"linears": []}))
    runtime.ranks.wait()


def written_outside(job: Job, shard: ShardPlan, names: list[str]) -> dict[str, Tensor]:
    """The named tensors as the output stores them; those of shards not written yet as they will be."""
    written = open_file(job.runtime.folder / shard.file)
    stored = {name: written.read(name) for name in names if name in written.entries}
    rest = read_outside(job.runtime.model, [name for name in names if name not in stored])
    return as_served(stored | {name: to_stored(name, tensor) for name, tensor in rest.items()}, job.served)


def quantized_outside(job: Job, names: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What the output holds of the named tensors outside the layers, one after the other."""
    heads = [linear for linear in job.plan.quantized if linear.unit == "head"]
    for shard in job.plan.shards:
        if shard.unit in ("embeddings", "head"):
            file = open_file(job.runtime.folder / shard.file)
            packed = heads if shard.unit == "head" else []
            stored = as_served(file.read_many(file.entries), job.served)
            tensors = dequantized(stored, packed, job.plan.format)
            yield from ((name, tensor) for name, tensor in tensors.items() if name in names)


def pack_layer(job: Job, layer: Layer, shard: ShardPlan, result: LayerResult) -> dict[str, Tensor]:
    """The tensors of the layer's shard by full name; packed ones are where they were computed."""
    quantized_names = {f"{name}.weight" for name in result.quantized}
    rest = {n: result.changed.get(n, tensor) for n, tensor in layer.source.items() if n not in quantized_names}
    tensors = {f"{layer.name}.{name}": to_stored(f"{layer.name}.{name}", tensor) for name, tensor in rest.items()}
    for name, quantized in result.quantized.items():
        packed = job.plan.format.pack(quantized)
        tensors |= {f"{layer.name}.{name}.{key}": tensor for key, tensor in packed.items()}
    require_planned(shard, tensors)
    return tensors


def unpack_layer(job: Job, layer: Layer, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters as the tensors of its shard stand for them (names local to the layer)."""
    tensors = dequantized(as_served(stored, job.served), job.plan.layer(layer.index).values(), job.plan.format)
    return {name.removeprefix(f"{layer.name}."): tensor for name, tensor in tensors.items()}


def require_planned(shard: ShardPlan, tensors: Mapping[str, Tensor]) -> None:
    """Stop before a shard is written that the plan does not know.

    Raises:
        OutputError: a name, type or shape differs.
    """
    planned = {name: (spec.dtype, spec.shape) for name, spec in shard.tensors.items()}
    computed = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if planned != computed:
        raise OutputError(f"{shard.file}: what was computed is not what was planned: {set(planned) ^ set(computed)}")


def write(
    journal: Journal, shard: ShardPlan, tensors: Callable[[], Mapping[str, Tensor]], records: list[dict[str, Any]]
) -> None:
    """Write a shard, and enter it in the journal as finished."""
    sha256 = write_shard(journal.folder / shard.file, tensors())
    journal.append(Unit(shard.unit, shard.file, sha256, {"linears": records}))


def read(job: Job, shard: ShardPlan) -> dict[str, Tensor]:
    """The tensors of a finished shard, on the device."""
    file = open_file(job.runtime.folder / shard.file)
    return file.read_many(file.entries, job.runtime.device)
