# SPDX-License-Identifier: Apache-2.0
"""What a row of `architectures` can say, and how it is read beside a model's config.

Names of modules are local to a decoder layer unless it is said otherwise. Sizes are arithmetic on the numbers of
config.json, such as "num_attention_heads * head_dim"; see `evaluate`.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import ModelError

EVERY = "every"  # the type of all layers of a family whose layers are alike
KEYS_AND_VALUES = "2 * num_key_value_heads * head_dim"  # what attention keeps of a token
# What most architectures have in common, by the last part of a module's name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
BY_INPUT = frozenset(
    {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "fc_out", "fc2", "c_proj", "wo", "w2"}
)

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # what chooses and weighs experts


@dataclass(frozen=True)
class Fold:
    """Where a scale of input channels can go: the producer's outputs are divided by it, what reads them multiplied.

    producer: a norm, or the linear whose outputs reach the readers channel by channel (v -> o through attention's
    averaging, up -> down through the gate's product)
    readers: every linear that reads these outputs, of one site or of several
    plus: what the producer adds to its weight before it multiplies by it: 1 for the norms of Gemma and of Qwen3-Next
    """

    producer: str
    readers: tuple[str, ...]
    plus: int = 0


@dataclass(frozen=True)
class Site:
    """Linears that read the very same input, in execution order, and so share a Gram matrix.

    fold: None when nothing can absorb a scale. Sites with the same fold share a scale, and need not share an input.
    """

    linears: tuple[str, ...]
    fold: Fold | None = None


def folded_site(producer: str, *linears: str, plus: int = 0) -> Site:
    """A site whose linears alone read what the producer returns."""
    return Site(linears, Fold(producer, linears, plus))


@dataclass(frozen=True)
class Part:
    """A part of a layer, such as its attention or its MLP.

    sites: its linears, in execution order
    sizes: linear -> (out_features, in_features); may be left out where `Family.optional` is
    biases: linear -> the switch of config.json that gives it a bias; "" if it always has one
    norms: norm -> its width
    per_token: how many numbers it keeps of each token of a sequence
    state: how many bytes it keeps of a sequence, however long that is
    """

    sites: tuple[Site, ...]
    sizes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    per_token: str = ""
    state: str = ""


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp calls an architecture, its tensors and its hyperparameters.

    modules: module -> its name in a block; outside: tensor outside the layers, by its full name -> its name
    keys: hyperparameter -> its value, in the order of the file; reals: which of them are floats
    paired: projection -> its number of heads, where llama.cpp rotates neighbouring pairs of rows, transformers halves
    """

    name: str
    modules: Mapping[str, str]
    outside: Mapping[str, str]
    keys: Mapping[str, str]
    reals: frozenset[str] = frozenset()
    paired: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """What a linear is to its layer, and to the engines that run it.

    site: the first linear that reads the same input; None: it is alone
    fused: the module that engines load it into, with others
    by_input: whether cards that share it have some of its columns each, and not some of its rows
    sixteen_bit: whether it stays in 16 bit unless a recipe names it
    """

    site: str | None = None
    fused: str | None = None
    by_input: bool = False
    sixteen_bit: bool = False


ALONE = Role()


@dataclass(frozen=True)
class Family:
    """An architecture as data.

    layers: type of layer, as config.json's `layer_types` says it -> its parts; EVERY: of all layers. Empty: the sites
    are found by watching the model run
    optional: what a config.json may leave out, with transformers' default (a head_dim of None: hidden_size shared out);
    None: transformers is asked for the tensors' shapes
    fused: module that engines load several linears into -> their names
    by_input: linears that are cut by their inputs over cards; they read what linears return that are cut by their
    outputs, as all others are
    sixteen_bit: small linears that engines keep in 16 bit
    experts: what checkpoints call gate, up and down of an expert
    stacked: what they call gate and up of all experts, and down of all, where those are one tensor each
    gguf: None where llama.cpp's names are not known
    kept: how many numbers a layer keeps of each token, where no part of it says so

    Linears are named here by the last part of their names.
    """

    layers: Mapping[str, tuple[Part, ...]]
    optional: Mapping[str, Any] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FUSED)
    by_input: frozenset[str] = BY_INPUT
    sixteen_bit: frozenset[str] = ROUTERS
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    gguf: Gguf | None = None
    kept: str = KEYS_AND_VALUES

    def types(self, config: Any, count: int) -> list[str]:
        """The type of each of the `count` layers: a key of `layers`, if there are any.

        Raises:
            ModelError: a type that the row does not have.
        """
        if EVERY in self.layers:
            return [EVERY] * count
        said = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
        types = list(said) if said else ["full_attention"] * count
        if self.layers and (unknown := sorted(set(types) - self.layers.keys())):
            raise ModelError(
                f"config.json: layer_types: expected {', '.join(self.layers)}, got {', '.join(unknown)[:80]}"
            )
        return types

    def sites(self, kind: str) -> tuple[Site, ...]:
        """The sites of a layer of this type, in execution order."""
        return tuple(site for part in self.layers[kind] for site in part.sites)

    def per_token(self, kind: str) -> str:
        """How many numbers a layer of this type keeps of each token of a sequence, as arithmetic."""
        if kind not in self.layers:
            return self.kept
        return " + ".join(part.per_token for part in self.layers[kind] if part.per_token) or "0"

    def state(self, kind: str) -> str:
        """How many bytes a layer of this type keeps of a sequence, however long that is, as arithmetic."""
        return " + ".join(part.state for part in self.layers.get(kind, ()) if part.state) or "0"

    def role(self, local: str) -> Role:
        """What a linear is, by its name within the layer."""
        parent, _, leaf = local.rpartition(".")
        fused = next((group for group, names in self.fused.items() if leaf in names), None)
        fused = f"{parent}.{fused}" if parent and fused else fused
        sites = (site for kind in self.layers for site in self.sites(kind))
        first = next((site.linears[0] for site in sites if local in site.linears), fused or local)
        return Role(first, fused, leaf in self.by_input, leaf in self.sixteen_bit)


OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, config: Any, **instead: Any) -> Any:
    """The value of arithmetic (+ - * //) on whole numbers and attributes of a config; instead: values to take first.

    A config without a head_dim shares out hidden_size; one without num_key_value_heads has one for each head.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                return instead[name] if name in instead else _number(config, name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"{expression!r}: not arithmetic on numbers of a config")

    return value(ast.parse(expression, mode="eval").body)


def _number(config: Any, name: str) -> Any:
    found = getattr(config, name, None)
    attention = getattr(config, "num_attention_heads", 0)  # a model without attention has none
    if not found and name == "head_dim":
        return config.hidden_size // attention if attention else 0
    if not found and name == "num_key_value_heads":
        return attention
    if found is None:
        raise ModelError(f"config.json: {name} is missing; the model's kind needs it")
    return found
