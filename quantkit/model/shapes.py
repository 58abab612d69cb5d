# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a model's tensors: their names and shapes, and nothing that needs a module or a weight.

For the families of `families` this is data, so a plan takes milliseconds. For all others, and for any config of these
families that leaves something open, `streaming.build` asks transformers itself. Both give equal `Shapes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from quantkit.model.unsupported import unsupported

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """The tensors of a model, without the model.

    config: its values as attributes
    layers_name: the name of the list of decoder layers, for example "model.layers"
    layer_tensors: every stored tensor of each layer, by its name within the layer, and its shape
    layer_linears: which modules of each layer are linears, in the model's order: (out_features, in_features)
    outside_tensors: the stored tensors outside the layers, by full name; a tied head has none
    input_name, head_name: the modules of the input embedding, and of the output embedding if there is one
    tied: whether the head shares the embedding's weight, which is then stored once
    embeddings, norms: the full names of the modules of these kinds
    """

    config: Any
    layers_name: str
    layer_tensors: tuple[Mapping[str, Shape], ...]
    layer_linears: tuple[Mapping[str, tuple[int, int]], ...]
    outside_tensors: Mapping[str, Shape]
    input_name: str
    head_name: str | None
    tied: bool
    embeddings: frozenset[str]
    norms: frozenset[str]

    def layer_name(self, index: int) -> str:
        """The full name of a layer, for example "model.layers.3"."""
        return f"{self.layers_name}.{index}"

    def layer_shapes(self, index: int) -> dict[str, Shape]:
        """The tensors of a layer (names local to it) and their shapes."""
        return dict(self.layer_tensors[index])

    def outside(self) -> dict[str, Shape]:
        """The stored tensors outside the decoder layers, by full name, with their shapes."""
        return dict(self.outside_tensors)

    def before_layers(self) -> dict[str, Shape]:
        """The input embedding."""
        return {n: shape for n, shape in self.outside_tensors.items() if n.startswith(f"{self.input_name}.")}

    def after_layers(self) -> dict[str, Shape]:
        """Everything else outside the layers: the last norm, the head, learned positions."""
        return {n: shape for n, shape in self.outside_tensors.items() if not n.startswith(f"{self.input_name}.")}


# What a config.json of a family may leave out, with transformers' default (a head_dim of None: hidden_size shared out).
# Families that are not here are not known as data.
OPTIONAL: dict[str, dict[str, Any]] = {
    "llama": {
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
        "sliding_window": None,
    },
    "mistral": {"tie_word_embeddings": False, "head_dim": None, "sliding_window": 4096},
    "qwen2": {"tie_word_embeddings": False, "use_sliding_window": False},
    "qwen3": {"tie_word_embeddings": False, "use_sliding_window": False, "attention_bias": False, "head_dim": 128},
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
ATTENTION_IN, ATTENTION_OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
MLP_IN, MLP_OUT = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"


def shapes_of(raw: Mapping[str, Any]) -> Shapes | None:
    """The shapes that a config.json's content describes; None: ask transformers, which knows more.

    Only what is plain is answered: a family of the table, every size said and a positive number, no sliding window.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in OPTIONAL or unsupported(raw):
        return None
    values = {**OPTIONAL[kind], **raw}
    if not _is_plain(values, OPTIONAL[kind]):
        return None
    hidden, inner, count, heads, kept, vocabulary, _ = (values[key] for key in SIZES)
    dim = values.get("head_dim") or hidden // heads
    linears = {
        **dict(zip(ATTENTION_IN, ((heads * dim, hidden), (kept * dim, hidden), (kept * dim, hidden)), strict=True)),
        ATTENTION_OUT: (hidden, heads * dim),
        **dict.fromkeys(MLP_IN, (inner, hidden)),
        MLP_OUT: (hidden, inner),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    layer: dict[str, Shape] = {
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": (linears[name][0],) for name in _with_bias(kind, values)},
        **{f"{name}.weight": (width,) for name, width in norms.items()},
    }
    tied = values["tie_word_embeddings"]
    head = {} if tied else {"lm_head.weight": (vocabulary, hidden)}
    return Shapes(
        config=SimpleNamespace(**values),
        layers_name="model.layers",
        layer_tensors=(layer,) * count,
        layer_linears=(linears,) * count,
        outside_tensors={"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,), **head},
        input_name="model.embed_tokens",
        head_name="lm_head",
        tied=tied,
        embeddings=frozenset({"model.embed_tokens"}),
        norms=frozenset({"model.norm", *(f"model.layers.{i}.{name}" for i in range(count) for name in norms)}),
    )


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


def _with_bias(kind: str, values: Mapping[str, Any]) -> Sequence[str]:
    if kind == "qwen2":
        return ATTENTION_IN
    optional = OPTIONAL[kind]
    attention = "attention_bias" in optional and values["attention_bias"]
    mlp = "mlp_bias" in optional and values["mlp_bias"]
    return [*((*ATTENTION_IN, ATTENTION_OUT) if attention else ()), *((*MLP_IN, MLP_OUT) if mlp else ())]
