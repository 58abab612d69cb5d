# SPDX-License-Identifier: Apache-2.0
"""A result document (quantkit.json) as a run writes it, for the tests of what is made from it."""

import math
from collections.abc import Sequence
from typing import Any

from quantkit.records import Result
from quantkit.report import card
from quantkit.report.pages import run

SHAPES = {  # of a 32B model
    "q_proj": (5120, 5120),
    "k_proj": (1024, 5120),
    "v_proj": (1024, 5120),
    "o_proj": (5120, 5120),
    "gate_proj": (27648, 5120),
    "up_proj": (27648, 5120),
    "down_proj": (5120, 27648),
}
GIB = 2**30


def linear(layer: int, kind: str, depth: int, bits: int = 4) -> dict[str, Any]:
    out_features, in_features = SHAPES[kind]
    block = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    wave = 1 + 0.5 * math.sin(1.7 * layer + len(kind)) + 2 * (layer / depth) ** 4
    return {
        "name": f"model.layers.{layer}.{block}.{kind}",
        "layer": layer,
        "kind": kind,
        "bits": bits,
        "group_size": 128,
        "symmetric": False,
        "method": "awq",
        "loss": 0.004 * wave * (1 + 0.3 * len(kind)) * 2 ** (4 - bits),
        "scale_gain": 0.12,
        "bytes": out_features * in_features * bits // 8 + out_features * in_features // 128 * 5 // 2,
        "out_features": out_features,
        "in_features": in_features,
    }


def token_set(source: str) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "samples": 128,
        "seqlen": 2048,
        "protocol": "documents concatenated, cut into windows that don't overlap",
        "notes": [],
    }


def example(depth: int = 6, *, bits: dict[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    """A passing run on `depth` layers; `bits` by kind makes it a mixed one, `changes` replace parts."""
    layers = [linear(i, kind, depth, (bits or {}).get(kind, 4)) for i in range(depth) for kind in SHAPES]
    stored = sum(layer["bytes"] for layer in layers)
    tensor_bytes = stored + 3_114_270_720
    weights, per_token, workspace, budget = tensor_bytes, 4096 * depth, int(1.2 * GIB), 22 * GIB
    longest = (budget - weights - workspace) // per_token
    kv = 8192 * per_token
    return {
        "quantkit_version": "0.1.0",
        "command": "quantkit awq deepseek-r1-32b --w-bit 4 --group 128 --budget 22GiB --context 8k",
        "model": "deepseek-r1-32b",
        "base_model": {"id": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "license": "mit"},
        "method": "awq",
        "format": "awq" if bits is None else "compressed-tensors",
        "scheme": {"bits": 4, "group_size": 128, "symmetric": False},
        "options": {"seed": 0, "damp": 0.01, "act_order": False},
        "calibration": token_set("mix"),
        "layers": layers,
        "bits_per_weight": 8 * stored / sum(x["out_features"] * x["in_features"] for x in layers),
        "total_bytes": tensor_bytes + 150_000,
        "tensor_bytes": tensor_bytes,
        "seconds": 5025.4,
        "peak_rss_bytes": int(11.4 * GIB),
        "peak_device_bytes": int(9.3 * GIB),
        "device": "cuda:0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7", "quantkit": "0.1.0"},
        "files": [
            {"name": f"model-{i:05d}-of-00003.safetensors", "bytes": tensor_bytes // 3, "sha256": f"{i}a" * 32}
            for i in range(1, 4)
        ],
        "fallbacks": [],
        "verification": {
            "perplexity": 8.5523,
            "perplexity_fp16": 8.4391,
            "kl_divergence": 0.02133,
            "kl_percentiles": {"p50": 0.0031, "p90": 0.0524, "p99": 0.241, "max": 3.912},
            "top1_agreement": 0.9432,
            "tokens": 262_016,
            "dtype": "bfloat16",
            "layer_errors": [
                {"layer": i, "relative_error": 0.012 + 0.05 * (i / depth) ** 1.5 + 0.003 * math.sin(i)}
                for i in range(depth)
            ],
            "eval": token_set("eval"),
            "limits": {"max_ppl_increase": 0.05, "max_kl": None},
            "fit": {
                "kv": "fp16",
                "kv_bytes_per_token": per_token,
                "kv_bytes": kv,
                "kv_layers": [{"layers": depth, "bytes_per_token": 4096, "window": None}],
                "tensor_parallel": {
                    "cards": 1,
                    "weights_bytes": weights,
                    "kv_bytes": kv,
                    "kv_bytes_per_token": per_token,
                    "workspace_bytes": workspace,
                },
                "context": 8192,
                "total_bytes": weights + kv + workspace,
                "budget_bytes": budget,
                "fits": weights + kv + workspace <= budget,
                "longest_context": longest,
                "max_position_embeddings": 131_072,
                "engines": {"vllm": None, "sglang": None, "transformers": None},
            },
            "verdict": "pass",
            "reasons": [],
        },
    } | changes


def render_card(document: dict[str, Any], repo_id: str | None = None, forced: Sequence[str] = ()) -> str:
    return card.render_card(Result.model_validate(document), repo_id, forced)


def render_report(document: dict[str, Any]) -> str:
    return run.render_report(Result.model_validate(document))
