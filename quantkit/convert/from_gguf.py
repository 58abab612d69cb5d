# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a 16-bit checkpoint: each weight becomes the float16 number nearest to what its block stands for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.journal import Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import shard_name, write_pieces
from quantkit.convert.plan import contents_of
from quantkit.convert.write import relative_distance
from quantkit.dtypes import stored_dtype, to_stored
from quantkit.formats import TensorSpec
from quantkit.gguf.reading import GGUFModel
from quantkit.model.shapes import Shapes
from quantkit.plan import ShardPlan
from quantkit.quantized import parameters
from quantkit.scheme import name_of


def plain_shards(model: Shapes) -> tuple[ShardPlan, ...]:
    """The files of the 16-bit model."""
    contents, shapes = contents_of(model), parameters(model)
    return tuple(
        ShardPlan(unit, shard_name(n, len(contents)), {x: TensorSpec(stored_dtype(x), shapes[x]) for x in names})
        for n, (unit, names) in enumerate(contents, start=1)
    )


def write_plain(opened: GGUFModel, shard: ShardPlan, out: Path) -> Unit:
    """Write a shard and measure, from what is read back, how far its linears are from their blocks.

    Raises:
        ModelError, NumericsError: a damaged file; values that float16 does not hold.
        OutputError: the disk is full.
    """

    def pieces(name: str) -> Iterator[Tensor]:
        yield to_stored(name, opened.read([name])[name])

    sha256 = write_pieces(out / shard.file, {n: (spec.dtype, spec.shape) for n, spec in shard.tensors.items()}, pieces)
    written, records = open_file(out / shard.file), []
    for linear in opened.linears:
        name = f"{linear.name}.weight"
        if linear.scheme is not None and name in shard.tensors:
            error = relative_distance([opened.read([name])[name]], [written.read(name)])
            nbytes, before = written.entries[name].nbytes, name_of(linear.scheme)
            plain = replace(linear, scheme=None)
            records.append(plain.record(nbytes, before=before, equal=False, weight_error=error).content())
    return Unit(shard.unit, shard.file, sha256, {"linears": records})
