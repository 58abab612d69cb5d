# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint calls the tensors of a model: transformers gives some of them other names when it loads them.

transformers holds these changes as data, for a model and for each model inside it, and they are read from there.
Whoever reads or writes files uses the checkpoint's names; only `streaming` asks what the modules in memory are called.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quantkit.errors import ModelError
from quantkit.model.shapes import Names

NUMBER = re.compile(r"\.(\d+)\.")


def names_of(model: PreTrainedModel, layers: str, layer: Collection[str], stored: Iterable[str]) -> Names:
    """What a checkpoint calls a model's tensors; within layers they have its names (see `take_names_within`).

    Args:
        model: on the meta device
        layers: the name of its list of decoder layers in memory
        layer: the tensors of the first layer, by their names within it
        stored: the checkpoint's tensors; none: the names that the model is published with are taken
    """
    state = model.state_dict(keep_vars=True)
    changed, original = _changes(model)
    first = (name for name in stored if all(int(number) == 0 for number in NUMBER.findall(f"{name}.")[:1]))
    found: dict[str, str] = {}
    for name in first:
        found.setdefault(_with_prefix(changed(name), model.base_model_prefix, state), name)
    outside = {found.get(n) or original(n): n for n in state if not n.startswith(f"{layers}.")}
    inside = {local: found.get(f"{layers}.0.{local}", "") for local in layer}
    fronts = [name.removesuffix(f".0.{local}") for local, name in inside.items() if name.endswith(f".0.{local}")]
    front = fronts[0] if fronts else original(f"{layers}.0.{next(iter(layer))}").partition(".0.")[0]
    return Names(front, layers, {name: other for name, other in outside.items() if name != other})


def take_names_within(model: PreTrainedModel, layers: str) -> None:
    """Let the modules and tensors within each decoder layer stand under the names that checkpoints have for them.

    What the model's own code calls them still leads there. Layers alike in their names are asked about once.

    Raises:
        ModelError: a name that this cannot be done for.
    """
    _, original = _changes(model)
    known: dict[str, str] = {}
    for index, layer in enumerate(model.get_submodule(layers).children()):
        names = {}
        for local in layer.state_dict(keep_vars=True):
            if NUMBER.sub(".0.", local) not in known:
                front, middle, after = original(f"{layers}.{index}.{local}").partition(f".{index}.")
                if not middle:
                    raise ModelError(f"{front}: a tensor of layer {index} that checkpoints have outside of it")
                known[NUMBER.sub(".0.", local)] = NUMBER.sub(".0.", after)
            names[local] = known[NUMBER.sub(".0.", local)]
        _rename(layer, {name: other for name, other in names.items() if NUMBER.sub(".0.", name) != other})


def _rename(layer: nn.Module, names: Mapping[str, str]) -> None:
    """Move tensors to other names, whole modules where all of a module moves; names: which -> where."""
    moves = {tuple(name.split(".")): tuple(other.split(".")) for name, other in names.items()}
    while moves:
        source, target = _widest(layer, *next(iter(moves.items())), moves)
        _move(layer, source, target)
        moves = {name: other for name, other in moves.items() if name[: len(source)] != source}


class Place(nn.Module):
    """What holds a tensor where only checkpoints have a module."""


Path = tuple[str, ...]


def _widest(layer: nn.Module, source: Path, target: Path, moves: Mapping[Path, Path]) -> tuple[Path, Path]:
    """The outermost module around a tensor that moves as a whole, and where to; else the tensor itself."""
    stay = {tuple(name.split(".")) for name in layer.state_dict(keep_vars=True)} - moves.keys()
    for count in range(min(len(source), len(target)) - 1, 0, -1):
        outer, place = source[:-count], target[:-count]
        apart = outer[: len(place)] != place and place[: len(outer)] != outer
        free = not any(name[: len(outer)] == outer or name[: len(place)] == place for name in stay)
        if source[-count:] == target[-count:] and apart and free:
            return outer, place
    return source, target


def _move(layer: nn.Module, source: Path, target: Path) -> None:
    """Put a module or tensor elsewhere in the tree; where it was, a property leads to it."""
    owner = layer.get_submodule(".".join(source[:-1]))
    holder = layer
    for name in target[:-1]:
        if name not in holder._modules:
            holder.add_module(name, Place())
        holder = holder.get_submodule(name)
    for kind in ("_modules", "_parameters", "_buffers"):
        if source[-1] in (those := getattr(owner, kind)):
            getattr(holder, kind)[target[-1]] = those.pop(source[-1])
    within = target[: len(source) - 1] == source[:-1]  # then a copy of the owner leads to a copy
    way = attrgetter(".".join(target[len(source) - 1 :]))
    leads = property(way if within else lambda _: getattr(holder, target[-1]))
    owner.__class__ = type(type(owner).__name__, (type(owner),), {source[-1]: leads})


def _with_prefix(name: str, prefix: str, state: Mapping[str, Any]) -> str:
    """A name with the base model's prefix put before it, or taken from it, where the model has it so.

    Checkpoints may have been saved from the base model, or from the one with a head around it.
    """
    if not prefix or name in state:
        return name
    bare = name.removeprefix(f"{prefix}.")
    return next((other for other in (bare, f"{prefix}.{name}") if other in state), name)


Rename = Callable[[str], str]


def _changes(model: PreTrainedModel) -> tuple[Rename, Rename]:
    """What transformers makes of a checkpoint's name when it loads it, and of a model's name when it saves it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming
    except ImportError:  # transformers 4
        return _older_changes(model)
    kept = [one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)]
    # As its `save_pretrained`: whether a prefix that may be left out was there, nobody knows.
    back = [one.reverse_transform() for one in reversed(kept) if not isinstance(one, PrefixChange)]
    return _chained(kept), _chained(back)


def _chained(changes: Iterable[Any]) -> Rename:
    changes = list(changes)

    def rename(name: str) -> str:
        for change in changes:
            name = change.rename_source_key(name)[0]
        return name

    return rename


def _older_changes(model: PreTrainedModel) -> tuple[Rename, Rename]:
    """The same for transformers 4, where a class holds patterns and their replacements."""
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}

    def rename(name: str) -> str:
        for pattern, replacement in patterns.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name

    def original(name: str) -> str:
        for pattern, replacement in patterns.items():
            plain = re.sub(r"\(.*\)", "", pattern.lstrip("^"))
            name, count = re.subn(f"^{re.escape(replacement)}", plain, name)
            if count:
                break
        return name

    return rename, original
