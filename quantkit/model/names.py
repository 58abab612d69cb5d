# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint calls the tensors of a model: transformers gives some of them other names when it loads them.

transformers holds these changes as data, for a model and for each model inside it, and they are read from there.
Whoever reads or writes files uses the checkpoint's names; only `streaming` asks what the modules in memory are called.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from quantkit.errors import ModelError
from quantkit.model.shapes import Names

NUMBER = re.compile(r"\.(\d+)\.")


def names_of(model: PreTrainedModel, layers: str, layer: Collection[str], stored: Iterable[str]) -> Names:
    """What a checkpoint calls a model's tensors.

    Args:
        model: on the meta device
        layers: the name of its list of decoder layers in memory
        layer: the tensors of the first layer, by their names within it
        stored: the checkpoint's tensors; none: the names that the model is published with are taken

    Raises:
        ModelError: tensors have other names within a layer than in memory.
    """
    state = model.state_dict(keep_vars=True)
    changed, original = _changes(model)
    first = (name for name in stored if all(int(number) == 0 for number in NUMBER.findall(f"{name}.")[:1]))
    found: dict[str, str] = {}
    for name in first:
        found.setdefault(_with_prefix(changed(name), model.base_model_prefix, state), name)
    outside = {found.get(n) or original(n): n for n in state if not n.startswith(f"{layers}.")}
    inside = {local: found.get(f"{layers}.0.{local}") or original(f"{layers}.0.{local}") for local in layer}
    fronts = {name.removesuffix(f".0.{local}") for local, name in inside.items() if name.endswith(f".0.{local}")}
    other = sorted(local for local, name in inside.items() if not name.endswith(f".0.{local}"))
    if other or len(fronts) != 1:
        example = inside[other[0]] if other else ", ".join(sorted(fronts))
        raise ModelError(
            f"{example}: transformers gives tensors within a layer of {model.config.model_type} other names when it "
            "loads them; this is not supported yet"
        )
    return Names(fronts.pop(), layers, {name: other for name, other in outside.items() if name != other})


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
