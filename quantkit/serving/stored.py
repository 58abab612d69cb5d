# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as its tensors' bytes: of which kind each is, and what of it lies on one of several cards.

With tensor parallel each card has its part of every linear and of the vocabulary, and all of the norms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantkit.checkpoint.header import spec_bytes
from quantkit.dtypes import ITEMSIZE
from quantkit.errors import SchemeError
from quantkit.model.shapes import Shapes
from quantkit.plan import STORED, LinearPlan
from quantkit.records import Shard
from quantkit.scheme import name_of
from quantkit.serving.engines import Heads, kept_heads, shard

KINDS = {
    "embeddings": "embeddings",
    "lm_head": "lm_head",
    "codes": "codes",
    "blocks": "blocks of codes and scales",
    "scales": "scales",
    "zeros": "zero points",
    "indices": "indices, shapes",
    "linears_16bit": "linears kept in 16 bit",
    "norms": "norms",
    "biases": "biases",
    "other": "other",
}
_KIND_OF_KEY = {
    **dict.fromkeys(("qweight", "weight_packed"), "codes"),
    **dict.fromkeys(("scales", "weight_scale"), "scales"),
    **dict.fromkeys(("qzeros", "weight_zero_point"), "zeros"),
    **dict.fromkeys(("g_idx", "weight_g_idx", "weight_shape"), "indices"),
    "bias": "biases",
}


@dataclass(frozen=True)
class Stored:
    """A checkpoint, planned or there: the bytes of its tensors by name, of its files, and what its linears are.

    head: the lm_head, if it is quantized; refusals: engine -> why it does not read this config
    """

    tensors: Mapping[str, int]
    file_bytes: int
    linears: tuple[LinearPlan, ...]
    format: str
    act_order: bool = False
    head: tuple[LinearPlan, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)


def kinds_of(model: Shapes, stored: Stored) -> dict[str, str]:
    """Tensor name -> a key of KINDS."""
    linears = {linear.name: linear.scheme for linear in stored.linears}
    head = model.head_name

    def kind(name: str) -> str:
        owner, _, key = name.rpartition(".")
        if owner == head:
            return "lm_head"
        if owner in model.embeddings:
            return "embeddings"
        if key in _KIND_OF_KEY:
            return _KIND_OF_KEY[key]
        if owner in linears:
            return "linears_16bit" if linears[owner] is None else "blocks"
        return "norms" if owner in model.norms else "other"

    return {name: kind(name) for name in stored.tensors}


def bytes_in_16_bit(model: Shapes) -> int:
    parts = [model.outside(), *(model.layer_shapes(index) for index in range(len(model.layer_tensors)))]
    numbers = sum(math.prod(shape) for shapes in parts for shape in shapes.values())
    return ITEMSIZE[STORED] * numbers + sum(map(spec_bytes, model.copied.values()))


def widest_input(linears: Sequence[LinearPlan]) -> int:
    return max(linear.in_features for linear in linears)


def widest_output(linears: Sequence[LinearPlan]) -> int:
    """Of linears that engines run as one, the sum."""
    widths: dict[tuple[int, str], int] = {}
    for linear in linears:
        key = (linear.layer, linear.role.fused or linear.local)
        widths[key] = widths.get(key, 0) + linear.out_features
    return max(widths.values())


def heads_on_card(heads: Heads, cards: int) -> int:
    try:
        return kept_heads(heads, cards)
    except SchemeError:  # told as a problem; the next larger whole number of heads
        return -(-heads.key_value // cards)


Shards = dict[str, tuple[int, int] | str]


def shards_of(linears: Sequence[LinearPlan], heads: Heads, cards: int) -> tuple[Shards, list[str]]:
    """Full name -> (out_features, in_features) on one card, or why it cannot be cut; and each such reason once."""
    parts: Shards = {}
    problems: dict[str, None] = {}
    for linear in linears:
        try:
            parts[linear.name] = shard(linear, heads, cards)
        except SchemeError as error:
            parts[linear.name] = str(error)
            problems[f"{linear.local}: {error}"] = None
    return parts, list(problems)


def shard_rows(linears: Sequence[LinearPlan], shards: Shards) -> list[Shard]:
    """One row for each kind of linear."""
    rows: dict[tuple[object, ...], list[LinearPlan]] = {}
    for linear in linears:
        rows.setdefault((linear.local, linear.scheme, linear.out_features, linear.in_features), []).append(linear)
    return [_shard_row(alike, shards[alike[0].name]) for alike in rows.values()]


def _shard_row(alike: Sequence[LinearPlan], part: tuple[int, int] | str) -> Shard:
    linear = alike[0]
    return Shard(
        linear=linear.local,
        scheme=name_of(linear.scheme),
        shape=[linear.out_features, linear.in_features],
        on_card=None if isinstance(part, str) else list(part),
        why_not=part if isinstance(part, str) else None,
        layers=len(alike),
    )


def card_weights(stored: Stored, kinds: Mapping[str, str], shards: Shards, cards: int) -> int:
    """The bytes of the weights on one card. What cannot be cut evenly is counted as if it could, rounded up."""
    if cards == 1:
        return sum(stored.tensors.values())
    linears = {linear.name: linear for linear in stored.linears}
    return sum(
        _on_card(name, size, kinds[name], linears.get(name.rpartition(".")[0]), shards, cards)
        for name, size in stored.tensors.items()
    )


def _on_card(name: str, size: int, kind: str, linear: LinearPlan | None, shards: Shards, cards: int) -> int:
    if kind in ("embeddings", "lm_head"):  # cut by rows of the vocabulary
        return -(-size // cards)
    if linear is None or name.endswith("weight_shape"):
        return size
    by_input = linear.role.by_input
    if kind == "indices":  # one for each input column
        return -(-size // cards) if by_input else size
    whole_rows = linear.scheme is not None and linear.scheme.groups(linear.in_features) == 1
    if by_input and (kind == "biases" or (whole_rows and kind in ("scales", "zeros"))):
        return size
    part = shards[linear.name]
    if isinstance(part, str):
        return -(-size // cards)
    share, whole = (part[1], linear.in_features) if by_input else (part[0], linear.out_features)
    return -(-size * share // whole)
