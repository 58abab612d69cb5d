# SPDX-License-Identifier: Apache-2.0
"""Models whose layers differ: linear attention, state spaces and convolutions between layers of attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING

from quantkit.formats import FORMATS
from quantkit.model.architectures import FAMILIES
from quantkit.model.config import load_config
from quantkit.model.skeleton import build
from quantkit.model.streaming import open_model
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Rule, resolver
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit
from tests.running import done, quantkit, run_words
from tests.tiny import load_whole, random_ids, save_tiny, stream_logits

DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
SIZES: dict[str, Any] = {"hidden_size": 64, "vocab_size": 96}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA_NET | {"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]},
    "qwen3_5_text": DELTA_NET,
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": MAMBA
    | {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128, "mamba_n_groups": 1, "head_dim": 16},
    "bamba": MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "nemotron_h": {  # without experts, of which its class has eight by default
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "head_dim": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 32,
    },
}


def saved(kind: str, folder: Path) -> Path:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return save_tiny(folder, kind, **SIZES | HYBRIDS[kind])


@pytest.mark.parametrize("kind", HYBRIDS)
def test_streamed_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    ids = random_ids(5) % 96
    with torch.no_grad():
        expected = load_whole(tmp_path)(ids).logits
    torch.testing.assert_close(stream_logits(open_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_files_hold_what_was_measured(kind: str, method: str, ids: Path, tmp_path: Path) -> None:
    model, out = saved(kind, tmp_path / "model"), tmp_path / "out"
    done(*run_words(method, model, out, ids))
    result = json.loads((out / "quantkit.json").read_text())
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    measured = json.loads(done(*verify).stdout)["verification"]["kl_divergence"]
    assert measured == result["verification"]["kl_divergence"]


def test_small_linears_stay_in_16_bit_and_the_result_says_so(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen3_5_text", tmp_path / "model"), tmp_path / "out"
    done(*run_words("awq", model, out, ids))
    result = json.loads((out / "quantkit.json").read_text())
    assert {layer["kind"] for layer in result["layers"]}.isdisjoint({"in_proj_a", "in_proj_b"})
    assert "4 small linears stay in 16 bit, as in engines: in_proj_a, in_proj_b" in " ".join(result["fallbacks"])
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    prefix = "model.layers.0.linear_attn"
    assert {f"{prefix}.in_proj_a", f"{prefix}.in_proj_b", f"{prefix}.in_proj_ba"} <= set(kept)
    scaled = {layer["kind"] for layer in result["layers"] if layer["scale"] != "1"}
    assert {"in_proj_qkv", "in_proj_z", "q_proj", "gate_proj"} <= scaled  # norms that multiply by 1 + w


def test_a_recipe_may_name_what_stays_in_16_bit() -> None:
    scheme, small = Scheme(4, 32, True), frozenset({"in_proj_a"})
    name = "model.layers.0.linear_attn.in_proj_a"
    assert resolver(Recipe(), scheme, small)(name, 0) is None
    everything = Recipe(rules=(Rule(match="*", bits=8), Rule(layers="0", bits=8)))
    assert resolver(everything, scheme, small)(name, 0) is None
    for rule in (Rule(kind="in_proj_a", bits=8), Rule(match="*.in_proj_a", bits=8)):
        assert resolver(Recipe(rules=(rule,)), scheme, small)(name, 0) == Scheme(8, 32, True)


def test_decay_rates_are_stored_as_they_are(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen3_5_text", tmp_path / "model"), tmp_path / "out"
    done(*run_words("rtn", model, out, ids))
    names = [f"model.layers.0.linear_attn.{key}" for key in ("A_log", "dt_bias")]
    with (
        safe_open(model / "model.safetensors", "pt") as original,
        safe_open(out / "model-00002-of-00006.safetensors", "pt") as written,
    ):
        for name in names:
            assert torch.equal(written.get_tensor(name), original.get_tensor(name))  # float32, by no means float16
        assert written.get_tensor("model.layers.0.linear_attn.conv1d.weight").dtype == torch.float16


def test_fit_counts_the_state_of_a_sequence(tmp_path: Path) -> None:
    model = build(load_config(saved("qwen3_5_text", tmp_path)))
    plan = make_plan(model, resolver(Recipe(), Scheme(4, 32, True), model.family.sixteen_bit), FORMATS["gptq"])
    convolution = 2 * (2 * 2 * 16 + 4 * 16) * (4 - 1)
    state = convolution + 4 * 4 * 16 * 16
    per_token = 2 * 2 * 2 * 16
    for context in (1, 1000):
        result = fit(model, plan, budget=2**30, context=context)
        assert result.kv_bytes == 2 * state + 2 * per_token * context  # two layers of each kind
        assert result.kv_bytes_per_token == 2 * per_token
    half = fit(model, plan, budget=2**30, context=1000, tensor_parallel=2).tensor_parallel
    assert half.kv_bytes == 2 * state // 2 + 2 * per_token // 2 * 1000


def test_a_linear_that_is_never_run_is_refused(ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = saved("jamba", tmp_path / "model"), tmp_path / "out"
    monkeypatch.delitem(FAMILIES, "jamba")
    answer = quantkit(*run_words("gptq", model, out, ids))
    assert answer.returncode == 1
    assert "model.layers.0.mamba.dt_proj: its weight is used without running it" in " ".join(answer.stderr.split())
    (tmp_path / "recipe.yaml").write_text("rules: [{kind: dt_proj, keep: 16bit}]")
    done(*run_words("gptq", model, out, ids, "--recipe", str(tmp_path / "recipe.yaml")))


def test_bits_are_shared_out_over_layers_that_differ(ids: Path, tmp_path: Path) -> None:
    model = saved("qwen3_5_text", tmp_path / "model")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    words = ["allocate", str(model), "--weights-only", "--budget", "150KiB", "--menu", "W3g32,W4g32,W8g32,16bit"]
    tokens = ["--calib", str(ids), "--eval", str(ids), "--probe-samples", "2", "--device", "cpu", "--engine", "any"]
    done(*words, *tokens, "--out", str(recipe), "--run", "--run-out", str(run), "--max-ppl-increase", "900%")
    result = json.loads((run / "quantkit.json").read_text())
    assert {layer["kind"] for layer in result["layers"]} >= {"in_proj_qkv", "q_proj"}
    assert {layer["kind"] for layer in result["layers"]}.isdisjoint({"in_proj_a", "in_proj_b"})
