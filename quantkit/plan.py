# SPDX-License-Identifier: Apache-2.0
"""Every byte of the output, known before any work: from the architecture and the schemes alone.

One unit of work is one shard: the embeddings first, then one per decoder layer, then what comes after the layers, then
what is copied as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quantkit.checkpoint.writer import shard_bytes, shard_name
from quantkit.dtypes import ITEMSIZE, stored_dtype
from quantkit.errors import SchemeError
from quantkit.formats import Format, QuantizedLayer, TensorSpec
from quantkit.formats.names import is_lm_head
from quantkit.model.family import ALONE, Role
from quantkit.model.shapes import Shapes
from quantkit.recipe import check_fused
from quantkit.records import Linear, Numbers, RecipeRow
from quantkit.scheme import Scheme

COPIED = "copied"  # the unit of work that writes what is no part of the text decoder
OUTSIDE = -1  # the layer number of the head
STORED = "float16"  # everything that is not quantized: exact for BF16 within float16's range, and what kernels take
DISK_MARGIN = 64 * 2**20  # config, tokenizer, report and a journal beside the shards


@dataclass(frozen=True)
class LinearPlan:
    """A linear of a decoder layer, or the head: full name, layer number (OUTSIDE: the head), name within the layer,
    shape; scheme None keeps 16 bit.

    method: how its integers are chosen, where that is not the same for all; role: what it is to layer and engines
    """

    name: str
    layer: int
    local: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    method: str | None = None
    role: Role = ALONE

    @property
    def kind(self) -> str:
        """The last part of its name."""
        return self.local.rpartition(".")[2]

    def record(self, nbytes: int, **figures: Any) -> Linear:
        """Its row in quantkit.json. nbytes: as stored; figures: method, loss and what else `records.Linear` has."""
        return Linear(
            name=self.name,
            layer=self.layer,
            kind=self.kind,
            **Numbers.fields_of(self.scheme),
            out_features=self.out_features,
            in_features=self.in_features,
            bytes=nbytes,
            **figures,
        )

    @property
    def unit(self) -> str:
        """The unit of work that quantizes it."""
        return "head" if self.layer == OUTSIDE else f"layer.{self.layer}"


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
    """The whole output before it exists. `quantization_config` is what config.json will say.

    linears: of the decoder layers; head: the lm_head, None where it is tied or there is none
    """

    format: Format
    linears: tuple[LinearPlan, ...]
    head: LinearPlan | None
    shards: tuple[ShardPlan, ...]
    quantization_config: dict[str, Any]

    @property
    def quantized(self) -> tuple[LinearPlan, ...]:
        """The linears that are quantized, the head last."""
        found = self.linears if self.head is None else (*self.linears, self.head)
        return tuple(linear for linear in found if linear.scheme is not None)

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
        quantized = {linear.name: linear for linear in self.quantized}
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
    def temporary_shards(self) -> bool:
        """Whether the shards are nothing that an engine loads, and go once the one file is made of them."""
        return self.format.block_bytes is not None and not self.quantization_config

    @property
    def served_bytes(self) -> int:
        """Bytes of the files that an engine loads; of a .gguf without its header."""
        return self.beside_bytes or self.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """Every bit of the quantized linears that is loaded (codes, scales, zeros, indices) over their weights."""
        weights = sum(linear.out_features * linear.in_features for linear in self.quantized)
        return 8 * sum(linear_bytes(self.format, linear) for linear in self.quantized) / weights

    @cached_property
    def _layers(self) -> dict[int, dict[str, LinearPlan]]:
        found: dict[int, dict[str, LinearPlan]] = {}
        for linear in self.linears:
            found.setdefault(linear.layer, {})[linear.local] = linear
        return found

    def layer(self, index: int) -> Mapping[str, LinearPlan]:
        """The linears of a decoder layer, by their name within it."""
        return self._layers.get(index, {})


def decoder_linears(model: Shapes) -> tuple[LinearPlan, ...]:
    """The linears of the decoder layers in order, in 16 bit as the original has them."""
    return tuple(
        LinearPlan(f"{model.layer_name(index)}.{local}", index, local, *shape, None, role=model.family.role(local))
        for index, linears in enumerate(model.layer_linears)
        for local, shape in linears.items()
    )


def head_linear(model: Shapes) -> LinearPlan | None:
    """The head in 16 bit, if it has a weight of its own."""
    name = model.head_name
    shape = model.outside().get(f"{name}.weight", ())
    return LinearPlan(name, OUTSIDE, name, *shape, None) if name and len(shape) == 2 else None


GROUPS = (128, 64, 32, 16, -1)  # what is tried, from the largest, where a group does not divide a width

Resolve = Callable[[str, int], Scheme | None]


def dividing(model: Shapes, resolve: Resolve, fmt: Format) -> tuple[Resolve, list[str]]:
    """The schemes with smaller groups for the linears whose width the group does not divide, and a note for each width.

    Each linear gets the largest group that divides its width. Where engines want one scheme for all, all get the
    largest that divides every width.
    """
    linears = [replace(linear, scheme=resolve(linear.name, linear.layer)) for linear in decoder_linears(model)]
    smaller: dict[str, Scheme] = {}
    counts: Counter[tuple[int, int, int]] = Counter()
    for scheme in dict.fromkeys(linear.scheme for linear in linears):
        own = [linear for linear in linears if linear.scheme == scheme]
        if scheme is None or not any(_is_odd(scheme, linear.in_features) for linear in own):
            continue
        alike = not fmt.usual_for(scheme, True)
        every = {linear.in_features for linear in own}
        for linear in own:
            if alike or _is_odd(scheme, linear.in_features):
                group = _largest_group(scheme, every if alike else {linear.in_features})
                fitting = replace(scheme, group_size=group)
                if fmt.why_not(fitting, linear.out_features, linear.in_features) is None:
                    smaller[linear.name] = fitting
                    counts[linear.in_features, scheme.group_size, group] += 1
    notes = [
        f"{count} linears of {width} columns: {f'groups of {group}' if group > 0 else 'whole rows'} instead of {usual}"
        for (width, usual, group), count in counts.items()
    ]
    return lambda name, layer: smaller.get(name) or resolve(name, layer), notes


def _largest_group(scheme: Scheme, widths: Iterable[int]) -> int:
    """The largest group below the scheme's that divides all widths; -1 if none does."""
    return next(g for g in GROUPS if g == -1 or (g < scheme.group_size and not any(width % g for width in widths)))


def _is_odd(scheme: Scheme, width: int) -> bool:
    return scheme.group_size > 0 and width % scheme.group_size > 0


def make_plan(
    model: Shapes,
    resolve: Callable[[str, int], Scheme | None],
    fmt: Format,
    *,
    head: Scheme | None = None,
    method_of: Callable[[str, int], str] | None = None,
    **config_options: Any,
) -> Plan:
    """Plan the output of a model in a format; resolve and method_of see each linear's full name and layer number.

    head: the scheme of the lm_head (None: 16 bit)

    Raises:
        SchemeError: a linear that the format cannot hold, with what would; linears that engines fuse with different
            schemes; several schemes in a format that has one; a tied head that is to be quantized.
    """
    linears = [replace(linear, scheme=resolve(linear.name, linear.layer)) for linear in decoder_linears(model)]
    by_layer: dict[int, dict[str, Scheme | None]] = {}
    for linear in linears:
        by_layer.setdefault(linear.layer, {})[linear.name] = linear.scheme
    for schemes in by_layer.values():
        check_fused(schemes, model.family.fused)
    last = _head(model, head)
    everything = [*linears, *([last] if last else [])]
    if method_of is not None:
        everything = [replace(linear, method=method_of(linear.name, linear.layer)) for linear in everything]
    for linear in everything:
        if linear.scheme is not None:
            reason = fmt.why_not(linear.scheme, linear.out_features, linear.in_features)
            if reason is not None:
                raise SchemeError(f"{linear.name}: {reason}", (linear.name,))
    quantized = [QuantizedLayer(linear.name, linear.scheme) for linear in everything if linear.scheme is not None]
    kept = [linear.name for linear in everything if linear.scheme is None]
    tied = [model.head_name] if model.head_name and last is None else []
    config = described(model, fmt, quantized, [*kept, *tied], **config_options)
    layers = tuple(linear for linear in everything if linear.layer != OUTSIDE)
    return Plan(fmt, layers, everything[-1] if last else None, _shards(model, everything, fmt), config)


def described(
    model: Shapes, fmt: Format, quantized: Iterable[QuantizedLayer], kept: Iterable[str], **options: Any
) -> dict[str, Any]:
    """What config.json says of a checkpoint: what is quantized, and all linears that are not, by every name they have.

    kept: the linears of the text decoder that stay in 16 bit
    """
    names = model.names.of_module
    layers = [QuantizedLayer(name, layer.scheme) for layer in quantized for name in names(layer.name)]
    others = [other for name in (*kept, *model.other_linears()) for other in names(name)]
    return fmt.config(layers, others, model.family.fused, **options)


def _head(model: Shapes, scheme: Scheme | None) -> LinearPlan | None:
    """The head, if it has a weight of its own."""
    head, name = head_linear(model), model.head_name or ""
    if head is None and name and scheme is not None:
        raise SchemeError(
            f"{name}: is the embedding's own matrix (tied), and embeddings stay in 16 bit; leave {name} in 16 bit",
            (name,),
        )
    if head is not None and scheme is not None and not is_lm_head(name):
        raise SchemeError(
            f"{name}: engines read a quantized head by the name of lm_head only; leave it in 16 bit", (name,)
        )
    return head and replace(head, scheme=scheme)


def _shards(model: Shapes, linears: list[LinearPlan], fmt: Format) -> tuple[ShardPlan, ...]:
    def plain(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(stored_dtype(name), shape) for name, shape in shapes.items()}

    by_layer: dict[int, list[LinearPlan]] = {}
    for linear in linears:
        if linear.scheme is not None:
            by_layer.setdefault(linear.layer, []).append(linear)
    contents: list[tuple[str, dict[str, TensorSpec]]] = [("embeddings", plain(model.before_layers()))]
    for index in range(len(model.layer_tensors)):
        prefix = model.layer_name(index)
        tensors = plain({f"{prefix}.{n}": shape for n, shape in model.layer_shapes(index).items()})
        contents.append((f"layer.{index}", _packed(tensors, by_layer.get(index, ()), fmt)))
    if after := _packed(plain(model.after_layers()), by_layer.get(OUTSIDE, ()), fmt):
        contents.append(("head", after))
    if model.copied:
        contents.append((COPIED, {name: TensorSpec(*spec) for name, spec in model.copied.items()}))
    return tuple(
        ShardPlan(unit, shard_name(number, len(contents)), tensors)
        for number, (unit, tensors) in enumerate(contents, start=1)
    )


def _packed(tensors: Mapping[str, TensorSpec], linears: Iterable[LinearPlan], fmt: Format) -> dict[str, TensorSpec]:
    """The tensors with the weights of linears replaced by what the format stores for them, at the end."""
    found = dict(tensors)
    for linear in linears:
        assert linear.scheme is not None
        found.pop(f"{linear.name}.weight", None)
        specs = fmt.specs(linear.scheme, linear.out_features, linear.in_features)
        found |= {f"{linear.name}.{key}": spec for key, spec in specs.items()}
    return found


def resolved(plan: Plan, method: str) -> list[RecipeRow]:
    """What a recipe comes to: one row for the linears of one kind that are treated alike, in the order of the model.

    method: of the linears whose plan names none
    """
    rows: dict[tuple[str, Scheme | None, str | None], list[LinearPlan]] = {}
    for linear in [*plan.linears, *([plan.head] if plan.head else [])]:
        used = None if linear.scheme is None else linear.method or method
        rows.setdefault((linear.kind, linear.scheme, used), []).append(linear)
    return [
        RecipeRow(
            kind=kind,
            layers=number_ranges([linear.layer for linear in linears if linear.layer != OUTSIDE]),
            **Numbers.fields_of(scheme),
            method=used,
            linears=len(linears),
            bytes=sum(linear_bytes(plan.format, linear) for linear in linears),
        )
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
