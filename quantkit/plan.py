# SPDX-License-Identifier: Apache-2.0
"""Every byte of the output, known before any work: from the architecture and the schemes alone.

One unit of work is one shard: the embeddings first, then one per decoder layer, then what comes after the layers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.checkpoint.writer import shard_bytes, shard_name
from quantkit.dtypes import ITEMSIZE
from quantkit.errors import SchemeError
from quantkit.formats import Format, QuantizedLayer, TensorSpec
from quantkit.model.shapes import Shapes
from quantkit.recipe import check_fused
from quantkit.scheme import Scheme

STORED = "float16"  # everything that is not quantized: exact for BF16 within float16's range, and what kernels take
DISK_MARGIN = 64 * 2**20  # config, tokenizer, report and a journal beside the shards


@dataclass(frozen=True)
class LinearPlan:
    """A linear of a decoder layer: full name, layer number, name within the layer, shape; scheme None keeps 16 bit.

    method: how its integers are chosen, where that is not the same for all
    """

    name: str
    layer: int
    local: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    method: str | None = None


@dataclass(frozen=True)
class ShardPlan:
    """One file of the output: the unit of work that makes it, its name, and its tensors."""

    unit: str
    file: str
    tensors: Mapping[str, TensorSpec]

    @property
    def tensor_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return shard_bytes({name: (spec.dtype, spec.shape) for name, spec in self.tensors.items()})


@dataclass(frozen=True)
class Plan:
    """The whole output before it exists. `quantization_config` is what config.json will say."""

    format: Format
    linears: tuple[LinearPlan, ...]
    shards: tuple[ShardPlan, ...]
    quantization_config: dict[str, Any]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without the headers of their files."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes by name of the tensors that an engine loads: of gguf those of the one file, not those beside it."""
        specs = {name: spec for shard in self.shards for name, spec in shard.tensors.items()}
        if self.format.block_bytes is None:
            return {name: spec.nbytes for name, spec in specs.items()}
        quantized = {linear.name: linear for linear in self.linears if linear.scheme is not None}
        blocks = {f"{name}.weight": linear_bytes(self.format, linear) for name, linear in quantized.items()}
        return blocks | {
            name: replace(spec, dtype=STORED if len(spec.shape) > 1 else "float32").nbytes
            for name, spec in specs.items()
            if name.endswith(".bias") or name.rpartition(".")[0] not in quantized
        }

    @property
    def beside_bytes(self) -> int:
        """Bytes of the one file that is made of all shards at the end, without its header: a .gguf; else 0."""
        return 0 if self.format.block_bytes is None else sum(self.loaded.values())

    @property
    def bits_per_weight(self) -> float:
        """Every bit of the quantized linears that is loaded (codes, scales, zeros, indices) over their weights."""
        linears = [linear for linear in self.linears if linear.scheme is not None]
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        return 8 * sum(linear_bytes(self.format, linear) for linear in linears) / weights

    def layer(self, index: int) -> dict[str, LinearPlan]:
        """The linears of a decoder layer, by their name within it."""
        return {linear.local: linear for linear in self.linears if linear.layer == index}


def make_plan(
    model: Shapes,
    resolve: Callable[[str, int], Scheme | None],
    fmt: Format,
    *,
    method_of: Callable[[str, int], str] | None = None,
    **config_options: Any,
) -> Plan:
    """Plan the output of a model in a format; resolve and method_of see each linear's full name and layer number.

    Raises:
        SchemeError: a linear that the format cannot hold, with what would; linears that engines fuse with different
            schemes; several schemes in a format that has one.
    """
    linears = [linear for index in range(len(model.layer_linears)) for linear in _linears(model, resolve, index)]
    if method_of is not None:
        linears = [replace(linear, method=method_of(linear.name, linear.layer)) for linear in linears]
    for linear in linears:
        if linear.scheme is not None:
            reason = fmt.why_not(linear.scheme, linear.out_features, linear.in_features)
            if reason is not None:
                raise SchemeError(f"{linear.name}: {reason}")
    quantized = [QuantizedLayer(linear.name, linear.scheme) for linear in linears if linear.scheme is not None]
    kept = [linear.name for linear in linears if linear.scheme is None]
    head = model.head_name
    config = fmt.config(quantized, [*kept, *([head] if head else [])], **config_options)
    return Plan(fmt, tuple(linears), _shards(model, linears, fmt), config)


def _linears(model: Shapes, resolve: Callable[[str, int], Scheme | None], index: int) -> list[LinearPlan]:
    prefix = model.layer_name(index)
    found = [
        LinearPlan(f"{prefix}.{name}", index, name, *shape, resolve(f"{prefix}.{name}", index))
        for name, shape in model.layer_linears[index].items()
    ]
    try:
        check_fused({linear.local: linear.scheme for linear in found})
    except SchemeError as error:
        raise SchemeError(f"{prefix}: {error}") from None
    return found


def _shards(model: Shapes, linears: list[LinearPlan], fmt: Format) -> tuple[ShardPlan, ...]:
    def plain(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(STORED, shape) for name, shape in shapes.items()}

    contents: list[tuple[str, dict[str, TensorSpec]]] = [("embeddings", plain(model.before_layers()))]
    for index in range(len(model.layer_tensors)):
        prefix = model.layer_name(index)
        tensors = plain({f"{prefix}.{n}": shape for n, shape in model.layer_shapes(index).items()})
        for linear in linears:
            if linear.layer == index and linear.scheme is not None:
                del tensors[f"{linear.name}.weight"]
                specs = fmt.specs(linear.scheme, linear.out_features, linear.in_features)
                tensors |= {f"{linear.name}.{key}": spec for key, spec in specs.items()}
        contents.append((f"layer.{index}", tensors))
    after = plain(model.after_layers())
    if after:
        contents.append(("head", after))
    return tuple(
        ShardPlan(unit, shard_name(number, len(contents)), tensors)
        for number, (unit, tensors) in enumerate(contents, start=1)
    )


def resolved(plan: Plan, method: str) -> list[dict[str, Any]]:
    """What a recipe comes to: one row for the linears of one kind that are treated alike, in the order of the model.

    kind, layers ("0-3,7"), bits, group_size, symmetric (None in 16 bit), method, linears (a number), bytes.
    """
    rows: dict[tuple[str, Scheme | None, str | None], list[LinearPlan]] = {}
    for linear in plan.linears:
        used = None if linear.scheme is None else linear.method or method
        rows.setdefault((linear.local.rpartition(".")[2], linear.scheme, used), []).append(linear)
    return [
        {
            "kind": kind,
            "layers": number_ranges([linear.layer for linear in linears]),
            "bits": scheme.bits if scheme else 16,
            "group_size": scheme.group_size if scheme else None,
            "symmetric": scheme.symmetric if scheme else None,
            "method": used,
            "linears": len(linears),
            "bytes": sum(linear_bytes(plan.format, linear) for linear in linears),
        }
        for (kind, scheme, used), linears in rows.items()
    ]


def linear_bytes(fmt: Format, linear: LinearPlan) -> int:
    """Bytes of the tensors of a linear that an engine loads, without its bias."""
    if linear.scheme is None:
        return ITEMSIZE[STORED] * linear.out_features * linear.in_features
    if fmt.block_bytes is not None:
        return fmt.block_bytes(linear.scheme, linear.out_features, linear.in_features)
    specs = fmt.specs(linear.scheme, linear.out_features, linear.in_features)
    return sum(spec.nbytes for spec in specs.values())


def number_ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
