# SPDX-License-Identifier: Apache-2.0
"""The architectures that are known as data: one row each, by config.json's model_type.

A family without a row still works: its sites are found by watching one forward pass, the folds into its norms by trying
them, and what engines make of its linears is taken from the usual names. Nothing here needs torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.model.family import (
    BY_INPUT,
    EVERY,
    FUSED,
    KEYS_AND_VALUES,
    ROUTERS,
    Family,
    Gguf,
    Part,
    Site,
    folded_site,
)

QUERY, KEY, VALUE, OUTPUT = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def _attention(biases: Mapping[str, str], **norms: str) -> Part:
    """Grouped-query attention behind a norm; norms: those within it, and their widths."""
    kept = "num_key_value_heads * head_dim"
    return Part(
        sites=(folded_site("input_layernorm", QUERY, KEY, VALUE), folded_site(VALUE, OUTPUT)),
        sizes={
            QUERY: ("num_attention_heads * head_dim", "hidden_size"),
            KEY: (kept, "hidden_size"),
            VALUE: (kept, "hidden_size"),
            OUTPUT: ("hidden_size", "num_attention_heads * head_dim"),
        },
        biases=biases,
        norms={"input_layernorm": "hidden_size"} | {f"self_attn.{name}": width for name, width in norms.items()},
        per_token=KEYS_AND_VALUES,
    )


def _gated_mlp(bias: str | None = None) -> Part:
    """An MLP with a gate behind a norm; bias: the switch that gives its linears one."""
    return Part(
        sites=(folded_site("post_attention_layernorm", GATE, UP), folded_site(UP, DOWN)),
        sizes={
            GATE: ("intermediate_size", "hidden_size"),
            UP: ("intermediate_size", "hidden_size"),
            DOWN: ("hidden_size", "intermediate_size"),
        },
        biases={} if bias is None else dict.fromkeys((GATE, UP, DOWN), bias),
        norms={"post_attention_layernorm": "hidden_size"},
    )


SWITCHED = dict.fromkeys((QUERY, KEY, VALUE, OUTPUT), "attention_bias")
HEAD_NORMS = {"q_norm": "head_dim", "k_norm": "head_dim"}

LLAMA_GGUF = Gguf(
    name="llama",
    modules={
        QUERY: "attn_q",
        KEY: "attn_k",
        VALUE: "attn_v",
        OUTPUT: "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        GATE: "ffn_gate",
        UP: "ffn_up",
        DOWN: "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    outside={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    keys={
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "rope.freq_base": "rope_theta",
        "vocab_size": "vocab_size",
    },
    reals=frozenset({"attention.layer_norm_rms_epsilon", "rope.freq_base"}),
    paired={QUERY: "num_attention_heads", KEY: "num_key_value_heads"},
)
QWEN_GGUF = replace(LLAMA_GGUF, name="qwen2", paired={})

DELTA_NET_STATE = (  # of a gated delta net: the convolution's last inputs in 16 bit, and its state in float32
    "2 * (2 * linear_num_key_heads * linear_key_head_dim + linear_num_value_heads * linear_value_head_dim)"
    " * (linear_conv_kernel_dim - 1)"
    " + 4 * linear_num_value_heads * linear_key_head_dim * linear_value_head_dim"
)


def _delta_net(*projections: str) -> Part:
    """Linear attention of Qwen3-Next; projections: of its inputs."""
    inputs = [f"linear_attn.{name}" for name in projections]
    return Part(
        sites=(
            folded_site("input_layernorm", *inputs, plus=1),
            folded_site("linear_attn.norm", "linear_attn.out_proj"),
        ),
        state=DELTA_NET_STATE,
    )


QWEN_ATTENTION = Part(  # q returns a gate beside the queries, which multiplies what o reads
    sites=(folded_site("input_layernorm", QUERY, KEY, VALUE, plus=1), folded_site(VALUE, OUTPUT)),
    per_token=KEYS_AND_VALUES,
)
QWEN_MLP = Part(sites=(folded_site("post_attention_layernorm", GATE, UP, plus=1), folded_site(UP, DOWN)))

QWEN_3_5 = Family(
    {
        "linear_attention": (_delta_net("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), QWEN_MLP),
        "full_attention": (QWEN_ATTENTION, QWEN_MLP),
    },
    fused=FUSED | {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")},
    sixteen_bit=ROUTERS | {"in_proj_b", "in_proj_a"},
)

W13 = FUSED | {"w13": ("w1", "w3")}
W132 = ("w1", "w3", "w2")  # gate, up and down of an expert
GRANITE_EXPERTS: dict[str, Any] = {
    "sixteen_bit": ROUTERS | {"layer"},  # of the router
    "experts": W132,
    "stacked": ("input_linear.weight", "output_linear.weight"),
}

GRANITE_MAMBA = Part(
    sites=(folded_site("input_layernorm", "mamba.in_proj"), folded_site("mamba.norm", "mamba.out_proj")),
    state=(  # the convolution's last inputs and the state, in 16 bit
        "2 * (mamba_n_heads * mamba_d_head + 2 * mamba_n_groups * mamba_d_state) * (mamba_d_conv - 1)"
        " + 2 * mamba_n_heads * mamba_d_head * mamba_d_state"
    ),
)
GRANITE_ATTENTION = Part(
    sites=(folded_site("input_layernorm", QUERY, KEY, VALUE), folded_site(VALUE, OUTPUT)), per_token=KEYS_AND_VALUES
)
GRANITE_MLP = Part(  # gate and up are one matrix
    sites=(
        folded_site("post_attention_layernorm", "shared_mlp.input_linear"),
        Site(("shared_mlp.output_linear",)),
    )
)

JAMBA_MAMBA = Part(  # the weight of dt_proj is used without running it
    sites=(
        folded_site("input_layernorm", "mamba.in_proj"),
        Site(("mamba.x_proj",)),
        Site(("mamba.out_proj",)),
    ),
    state=("2 * mamba_expand * hidden_size * (mamba_d_conv - 1) + 2 * mamba_expand * hidden_size * mamba_d_state"),
)
JAMBA_MLP = Part(
    sites=(
        folded_site("pre_ff_layernorm", "feed_forward.gate_proj", "feed_forward.up_proj"),
        folded_site("feed_forward.up_proj", "feed_forward.down_proj"),
    )
)

LFM2_MLP = Part(
    sites=(
        folded_site("ffn_norm", "feed_forward.w1", "feed_forward.w3"),
        folded_site("feed_forward.w3", "feed_forward.w2"),
    )
)

# Latent attention: engines keep what keys and values are made of, on each card, and not those.
LATENT = Family(
    {},
    fused=FUSED | {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")},
    kept="kv_lora_rank + qk_rope_head_dim",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        {EVERY: (_attention(SWITCHED), _gated_mlp("mlp_bias"))},
        optional={
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": None,
            "sliding_window": None,
        },
        gguf=LLAMA_GGUF,
    ),
    "mistral": Family(
        {EVERY: (_attention({}), _gated_mlp())},
        optional={"tie_word_embeddings": False, "head_dim": None, "sliding_window": 4096},
        gguf=LLAMA_GGUF,
    ),
    "qwen2": Family(
        {EVERY: (_attention(dict.fromkeys((QUERY, KEY, VALUE), "")), _gated_mlp())},
        optional={"tie_word_embeddings": False, "use_sliding_window": False},
        gguf=QWEN_GGUF,
    ),
    "qwen3": Family(
        {EVERY: (_attention(SWITCHED, **HEAD_NORMS), _gated_mlp())},
        optional={
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "attention_bias": False,
            "head_dim": 128,
        },
        gguf=replace(QWEN_GGUF, name="qwen3"),
    ),
    "qwen3_next": Family(
        {
            "linear_attention": (_delta_net("in_proj_qkvz", "in_proj_ba"), QWEN_MLP),
            "full_attention": (QWEN_ATTENTION, QWEN_MLP),
        },
        sixteen_bit=ROUTERS | {"in_proj_ba"},
    ),
    "qwen3_5_text": QWEN_3_5,
    "qwen3_5_moe_text": QWEN_3_5,
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2", "lfm2_moe"), Family({}, fused=W13, experts=W132)),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        Family({}, fused=W13, by_input=BY_INPUT | {"output_linear"}, **GRANITE_EXPERTS),
    ),
    "granitemoehybrid": Family(
        {
            "linear_attention": (GRANITE_MAMBA, GRANITE_MLP),
            "full_attention": (GRANITE_ATTENTION, GRANITE_MLP),
            "mamba": (GRANITE_MAMBA, GRANITE_MLP),  # as older transformers say it
            "attention": (GRANITE_ATTENTION, GRANITE_MLP),
        },
        fused=W13,
        by_input=BY_INPUT | {"output_linear"},
        **GRANITE_EXPERTS,
    ),
    "jamba": Family(
        {
            "linear_attention": (JAMBA_MAMBA, JAMBA_MLP),
            "full_attention": (GRANITE_ATTENTION, JAMBA_MLP),
            "mamba": (JAMBA_MAMBA, JAMBA_MLP),
            "attention": (GRANITE_ATTENTION, JAMBA_MLP),
        },
        sixteen_bit=ROUTERS | {"dt_proj"},
    ),
    "lfm2": Family(
        {
            "conv": (
                Part(
                    sites=(folded_site("operator_norm", "conv.in_proj"), Site(("conv.out_proj",))),
                    state="2 * hidden_size * (conv_L_cache - 1)",
                ),
                LFM2_MLP,
            ),
            "full_attention": (
                Part(
                    sites=(folded_site("operator_norm", QUERY, KEY, VALUE), folded_site(VALUE, "self_attn.out_proj")),
                    per_token=KEYS_AND_VALUES,
                ),
                LFM2_MLP,
            ),
        },
        fused=W13,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    "minicpm3": Family({}, kept="2 * num_key_value_heads * (qk_nope_head_dim + qk_rope_head_dim)"),
}
WITHOUT_ROW = Family({})


def family_of(kind: Any) -> Family:
    """The row of a model_type, or what is taken of a family without one."""
    return FAMILIES.get(kind, WITHOUT_ROW)
