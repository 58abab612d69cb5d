# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a model's tensors: their names and shapes, and nothing that needs a module or a weight.

For a family whose row says its sizes (`architectures`) a plan takes milliseconds. For all others, and for any config of
these families that leaves something open, `skeleton.build` asks transformers itself. Both give equal `Shapes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from quantkit.checkpoint.header import Spec
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.architectures import family_of
from quantkit.model.family import Family, Part, Site, evaluate
from quantkit.model.unsupported import mixture, unsupported

Shape = tuple[int, ...]
DERIVED = (
    ".inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
)  # tensors that old checkpoints hold and the model computes


ENGINES_LAYERS = "language_model.model.layers"  # vLLM's own name for the layers of a decoder with a tower


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the list of decoder layers, and what the model in memory calls it.

    others: tensors outside the layers that the model in memory calls otherwise -> that name
    """

    layers: str
    in_memory: str
    others: Mapping[str, str] = field(default_factory=dict)

    def of_module(self, name: str) -> list[str]:
        """Every name that a module has: readers of a config go by one or the other."""
        if name.startswith(f"{self.layers}."):
            engines = [ENGINES_LAYERS] if ".language_model." in f".{self.in_memory}" else []
            fronts = dict.fromkeys((self.layers, self.in_memory, *engines))
            return [front + name.removeprefix(self.layers) for front in fronts]
        weight = f"{name}.weight"
        return list(dict.fromkeys((name, self.others.get(weight, weight).removesuffix(".weight"))))


@dataclass(frozen=True)
class Shapes:
    """The tensors of a model, by their names in its checkpoint, without the model.

    config: the values of its config, or of its text decoder's, as attributes
    family: the row of its architecture, or what is taken of a family without one
    names: of the list of decoder layers, for example "model.layers"
    layer_tensors: every stored tensor of each layer, by its name within the layer, and its shape
    layer_linears: which modules of each layer are linears, in the model's order: (out_features, in_features)
    outside_tensors: the stored tensors outside the layers, by full name; a tied head has none
    input_name, head_name: the modules of the input embedding, and of the output embedding if there is one
    tied: whether the head shares the embedding's weight, which is then stored once
    embeddings, norms: the full names of the modules of these kinds
    copied: the tensors that are no part of the text decoder: towers, projectors, heads that predict later tokens
    """

    config: Any
    family: Family
    names: Names
    layer_tensors: tuple[Mapping[str, Shape], ...]
    layer_linears: tuple[Mapping[str, tuple[int, int]], ...]
    outside_tensors: Mapping[str, Shape]
    input_name: str
    head_name: str | None
    tied: bool
    embeddings: frozenset[str]
    norms: frozenset[str]
    copied: Mapping[str, Spec]

    @property
    def layers_name(self) -> str:
        """The name of the list of decoder layers in the checkpoint."""
        return self.names.layers

    @property
    def hidden_width(self) -> int:
        """Numbers of the hidden state of a token."""
        return int(self.config.hidden_size)

    @property
    def state_width(self) -> int:
        """Numbers of all that a token takes through the layers; see `carried`."""
        return self.hidden_width

    def layer_name(self, index: int) -> str:
        """The full name of a layer, for example "model.layers.3"."""
        return f"{self.layers_name}.{index}"

    def layer_config(self, index: int) -> Any:
        """The values of the config for one layer: heads and their width may differ from one to the next."""
        each = getattr(self.config, "per_layer_config", None)
        return self.config if each is None or isinstance(each, Mapping) else each[index]

    def layer_shapes(self, index: int) -> dict[str, Shape]:
        """The tensors of a layer (names local to it) and their shapes."""
        return dict(self.layer_tensors[index])

    def known_sites(self) -> list[tuple[Site, ...]]:
        """The sites of each layer by the row of its family; empty without a row."""
        if not self.family.layers:
            return []
        return [self.family.sites(kind) for kind in self.family.types(self.config, len(self.layer_linears))]

    def copied_parts(self) -> list[str]:
        """What is copied, in words: "model.visual", "mtp"."""
        fronts = ("model", self.layers_name.partition(".")[0])
        names = (name.split(".") for name in self.copied)
        return list(dict.fromkeys(".".join(parts[: 2 if parts[0] in fronts else 1]) for parts in names))

    def other_linears(self) -> list[str]:
        """The modules outside the layers that may be linears, but for the head: those with a matrix as their weight."""
        shapes = self.outside() | {name: shape for name, (_, shape) in self.copied.items()}
        names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        return [n for n in names if n != self.head_name and n not in self.embeddings and f"{n}.weight" in shapes]

    def outside(self) -> dict[str, Shape]:
        """The stored tensors outside the decoder layers, by full name, with their shapes."""
        return dict(self.outside_tensors)

    def before_layers(self) -> dict[str, Shape]:
        """The input embedding."""
        return {n: shape for n, shape in self.outside_tensors.items() if n.startswith(f"{self.input_name}.")}

    def after_layers(self) -> dict[str, Shape]:
        """Everything else outside the layers: the last norm, the head, learned positions."""
        return {n: shape for n, shape in self.outside_tensors.items() if not n.startswith(f"{self.input_name}.")}


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def text_values(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json's content says of the text decoder: a part of it where there is a tower beside."""
    text = raw.get("text_config")
    return text if isinstance(text, Mapping) else raw


def shapes_of(raw: Mapping[str, Any]) -> Shapes | None:
    """The shapes that a config.json's content describes; None: ask transformers, which knows more.

    Only what is plain is answered: a family whose row says its sizes, every number there and positive, no sliding
    window.
    """
    family = family_of(raw.get("model_type"))
    if family.optional is None or unsupported(raw) or mixture(raw):
        return None
    values = {**family.optional, **raw}
    if not _is_plain(values, family.optional):
        return None
    config = SimpleNamespace(**values)
    kinds = {kind: _layer(parts, config) for kind, parts in family.layers.items()}
    types = family.types(config, config.num_hidden_layers)
    table = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": table["model.embed_tokens.weight"]}
    norms = {
        f"model.layers.{index}.{name}"
        for index, kind in enumerate(types)
        for part in family.layers[kind]
        for name in part.norms
    }
    return Shapes(
        config=config,
        family=family,
        names=Names("model.layers", "model.layers"),
        layer_tensors=tuple(kinds[kind][0] for kind in types),
        layer_linears=tuple(kinds[kind][1] for kind in types),
        outside_tensors={**table, "model.norm.weight": (config.hidden_size,), **head},
        input_name="model.embed_tokens",
        head_name="lm_head",
        tied=config.tie_word_embeddings,
        embeddings=frozenset({"model.embed_tokens"}),
        norms=frozenset({"model.norm", *norms}),
        copied={},
    )


def _layer(parts: Sequence[Part], config: Any) -> tuple[dict[str, Shape], dict[str, tuple[int, int]]]:
    """The tensors of a layer, and its linears, with their shapes."""
    tensors: dict[str, Shape] = {}
    linears: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, (rows, columns) in part.sizes.items():
            linears[name] = shape = (evaluate(rows, config), evaluate(columns, config))
            tensors[f"{name}.weight"] = shape
            switch = part.biases.get(name)
            if switch == "" or (switch is not None and getattr(config, switch)):
                tensors[f"{name}.bias"] = shape[:1]
        tensors |= {f"{name}.weight": (evaluate(width, config),) for name, width in part.norms.items()}
    return tensors, linears


def _is_plain(values: Mapping[str, Any], optional: Mapping[str, Any]) -> bool:
    sizes = [values.get(key) for key in SIZES]
    if "head_dim" in values and (values["head_dim"] is not None or optional.get("head_dim", 0) is not None):
        sizes.append(values["head_dim"])
    if any(type(size) is not int or size < 1 for size in sizes):
        return False
    if any(type(values[key]) is not bool for key, usual in optional.items() if type(usual) is bool):
        return False
    window = values["use_sliding_window" if "use_sliding_window" in optional else "sliding_window"]
    shared_out = bool(values.get("head_dim")) or values["hidden_size"] % values["num_attention_heads"] == 0
    return shared_out and values["num_attention_heads"] % values["num_key_value_heads"] == 0 and not window


def with_embedding(model: Shapes, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tied table under the embedding's name, where it has it under the head's alone."""
    head, embedding = f"{model.head_name}.weight", f"{model.input_name}.weight"
    if not model.tied or embedding in checkpoint.entries or head not in checkpoint.entries:
        return checkpoint
    entries = dict(checkpoint.entries)
    entries[embedding] = entries.pop(head)
    return replace(checkpoint, entries=entries)
