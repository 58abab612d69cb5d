# SPDX-License-Identifier: Apache-2.0
"""The same integers in another format: from the files of a checkpoint to other files, one decoder layer at a time.

What a linear holds is known before any work from its scales, zero points and group index, a few percent of the file: so
whether the target can hold it is known, too (`obstacle`). What it can hold is unpacked, packed, written, read back from
the file and compared: codes, scales, zero points and group index must be equal. What it cannot is refused, or rounded
again on request, and then the difference of what is read back is measured.

Nothing is as large as a layer but its packed tensors: plain tensors are copied in pieces, and weights exist as floats
a few rows at a time.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.writer import shard_name
from quantkit.convert.survey import shape_of
from quantkit.convert.targets import Target, choose_targets, spec_arguments
from quantkit.dtypes import stored_dtype
from quantkit.errors import OutputError
from quantkit.formats import Format, QuantizedLayer, TensorSpec
from quantkit.formats.base import SCALES
from quantkit.formats.reading import read_schemes
from quantkit.model.shapes import Shapes
from quantkit.plan import COPIED, OUTSIDE, ShardPlan, described
from quantkit.quantized import QuantizedCheckpoint, parameters, require_complete


@dataclass(frozen=True)
class Conversion:
    """Everything that determines the output.

    format: None: 16 bit, nothing is quantized
    left_out: tensors of the source that change nothing, and are not copied
    """

    source: QuantizedCheckpoint
    format: Format | None
    targets: tuple[Target, ...]
    shards: tuple[ShardPlan, ...]
    quantization_config: dict[str, Any]
    out: Path
    left_out: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether every integer stays as it is."""
        return self.format is not None and all(target.obstacle is None for target in self.targets)


def make_conversion(source: QuantizedCheckpoint, fmt: Format | None, out: Path, *, requantize: bool) -> Conversion:
    """Plan the output: every tensor's name, dtype and shape, and what config.json will say.

    Raises:
        SchemeError: see `choose_targets` and the format's config.
        ModelError: tensors that are missing or have no place, see `require_complete`.
    """
    left_out = require_complete(source)
    targets = choose_targets(source, fmt, requantize=requantize)
    shards = _shards(source, fmt, targets)
    if fmt is None:
        return Conversion(source, None, targets, shards, {}, out, left_out)
    quantized = [QuantizedLayer(t.linear.name, t.linear.scheme) for t in targets if t.linear.scheme is not None]
    kept = [t.linear.name for t in targets if t.linear.scheme is None and t.linear.layer != OUTSIDE]
    head = source.model.head_name
    if head and head not in {layer.name for layer in quantized}:
        kept.append(head)
    config = described(source.model, fmt, quantized, kept, **_config_options(source, fmt, targets))
    _require_same_meaning(fmt, targets, config, shards)
    return Conversion(source, fmt, targets, shards, config, out, left_out)


def _config_options(source: QuantizedCheckpoint, fmt: Format, targets: tuple[Target, ...]) -> dict[str, Any]:
    """How GPTQ was run, where the source says so, and whether an index that is not in order is written."""
    said = source.quantization
    quantized = [t for t in targets if t.linear.scheme is not None]
    holds = "g_idx" in fmt.specs(*spec_arguments(quantized[0].linear))
    damp = said.get("damp_percent")
    options: dict[str, Any] = {"desc_act": holds and any(_keeps_order(source, t) for t in quantized)}
    if isinstance(damp, float):
        options["damp_percent"] = damp
    return options | {"static_groups": bool(said.get("static_groups"))}


def _keeps_order(source: QuantizedCheckpoint, target: Target) -> bool:
    name = f"{target.before.name}.g_idx"
    if target.obstacle is not None or name not in source.checkpoint.entries:
        return False
    g_idx = source.checkpoint.read(name)
    return not bool((g_idx.diff() >= 0).all())


def _require_same_meaning(
    fmt: Format, targets: tuple[Target, ...], config: dict[str, Any], shards: tuple[ShardPlan, ...]
) -> None:
    """The config must say of every linear what was meant."""
    stored = {name: spec for shard in shards for name, spec in shard.tensors.items()}
    linears = {target.linear.name: target.linear for target in targets}
    _, schemes = read_schemes(config, {name: shape_of(linear) for name, linear in linears.items()}, stored)
    for name, linear in linears.items():
        meant, said = linear.scheme, schemes[name]
        if fmt.stores_zeros and meant and said:
            meant = replace(meant, symmetric=said.symmetric)
        if meant != said:
            raise OutputError(f"{name}: {meant or '16 bit'} is meant, config.json would say {said or '16 bit'}")


def contents_of(model: Shapes) -> list[tuple[str, list[str]]]:
    """The files of a run: one for the embeddings, one for each decoder layer, one for what follows, each with its
    parameters; and one for what is copied.
    """
    contents = [("embeddings", list(model.before_layers()))]
    for index in range(len(model.layer_tensors)):
        prefix = model.layer_name(index)
        contents.append((f"layer.{index}", [f"{prefix}.{name}" for name in model.layer_shapes(index)]))
    others = (("head", list(model.after_layers())), (COPIED, list(model.copied)))
    return contents + [(unit, names) for unit, names in others if names]


def _shards(source: QuantizedCheckpoint, fmt: Format | None, targets: tuple[Target, ...]) -> tuple[ShardPlan, ...]:
    architecture, contents = source.model, contents_of(source.model)
    by_name = {target.linear.name: target for target in targets}
    shapes = parameters(architecture)

    def specs(name: str) -> dict[str, TensorSpec]:
        if name in architecture.copied:
            return {name: TensorSpec(*architecture.copied[name])}
        owner, _, key = name.rpartition(".")
        target = by_name.get(owner)
        if fmt is None:
            return {name: TensorSpec(stored_dtype(name), shapes[name])}
        if key != "weight" or target is None or target.linear.scheme is None:
            return {name: TensorSpec(source.checkpoint.entries[name].dtype, shapes[name])}
        return {
            f"{owner}.{key}": replace(spec, dtype=target.scale_dtype) if spec.dtype == SCALES else spec
            for key, spec in fmt.specs(*spec_arguments(target.linear)).items()
        }

    return tuple(
        ShardPlan(unit, shard_name(number, len(contents)), {n: s for name in names for n, s in specs(name).items()})
        for number, (unit, names) in enumerate(contents, start=1)
    )
