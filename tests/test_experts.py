# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: every expert is a linear like others, calibrated on the tokens that are sent to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from quantkit.checkpoint.journal import JOURNAL
from quantkit.errors import ModelError
from quantkit.formats.names import expert_of
from quantkit.grids.registry import dequantize
from quantkit.methods.site import QUANTIZE, SiteInput
from quantkit.methods.starved import Evidence, round_starved
from quantkit.methods.table import Options
from quantkit.model.streaming import StreamedModel, open_model
from quantkit.quantized import open_quantized, parameters
from quantkit.scheme import Scheme
from quantkit.stats import SiteStats, collect
from tests.running import done, quantkit, run_words
from tests.test_hybrids import DELTA_NET
from tests.tiny import load_whole, random_ids, save_tiny, stream_logits

SIZES: dict[str, Any] = {"hidden_size": 64, "vocab_size": 96, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
SHARED: dict[str, Any] = {"num_experts": 8, "shared_expert_intermediate_size": 64}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "qwen2_moe": SHARED | {"mlp_only_layers": [0]},
    "qwen3_next": SHARED | DELTA_NET,
    "qwen3_5_moe_text": SHARED | DELTA_NET,
    "mixtral": {"num_local_experts": 8},  # under other names than in memory
    "granitemoe": {"num_local_experts": 8, "intermediate_size": 32},  # also, and stacked in the file
    "granitemoeshared": {"num_local_experts": 8, "intermediate_size": 32, "shared_intermediate_size": 64},
    "olmoe": {"num_experts": 8, "intermediate_size": 32},
    "glm4_moe": GROUPED | {"first_k_dense_replace": 1},
    "glm4_moe_lite": GROUPED | LATENT | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": GROUPED | LATENT | {"first_k_dense_replace": 1},
    "deepseek_v3": GROUPED | LATENT | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 16,
        "intermediate_size": 64,
        "sliding_window": 8,
        "layer_types": WINDOWS,
    },
    "laguna": SHARED | {"num_attention_heads": 8},  # a gate for each head
    "mellum": {"num_experts": 8},
}


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return save_tiny(folder, kind, **SIZES | MIXTURES[kind] | changes)


def weights_of(out: Path, model: StreamedModel) -> dict[str, Tensor]:
    """What a checkpoint of ours stands for, by the names that the model is published with."""
    return open_quantized(out).read([*parameters(model)])


@pytest.mark.parametrize("kind", MIXTURES)
def test_streamed_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    ids = random_ids(5) % 96
    with torch.no_grad():
        expected = load_whole(tmp_path)(ids).logits
    torch.testing.assert_close(stream_logits(open_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, "awq") for kind in MIXTURES] + [("qwen3_moe", "rtn"), ("qwen2_moe", "gptq")]
)
def test_the_files_hold_what_was_measured(kind: str, method: str, ids: Path, tmp_path: Path) -> None:
    model, out = saved(kind, tmp_path / "model"), tmp_path / "out"
    done(*run_words(method, model, out, ids))
    result = json.loads((out / "quantkit.json").read_text())
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    measured = json.loads(done(*verify).stdout)["verification"]["kl_divergence"]
    assert measured == result["verification"]["kl_divergence"]
    for row in result["layers"]:
        assert row["bits"] == 4
    experts = sum(expert_of(row["name"]) is not None for row in result["layers"])
    assert experts >= 2 * 8 * 3


def test_transformers_computes_what_was_measured(ids: Path, tmp_path: Path) -> None:
    model, out, again = saved("qwen3_moe", tmp_path / "model"), tmp_path / "out", tmp_path / "again"
    done(*run_words("awq", model, out, ids))
    again.mkdir()
    save_file(weights_of(out, open_model(model)), again / "model.safetensors")
    (again / "config.json").write_bytes((model / "config.json").read_bytes())
    tokens = load_file(ids)["input_ids"]
    with torch.no_grad():
        first, second = (load_whole(folder)(tokens).logits.double().log_softmax(-1) for folder in (model, again))
    divergence = (first.exp() * (first - second)).sum(-1)[:, :-1].mean()
    assert float(divergence) == pytest.approx(kl(out), rel=1e-3)


def records(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "quantkit.json").read_text())["layers"]
    return found


def kl(out: Path) -> float:
    return float(json.loads((out / "quantkit.json").read_text())["verification"]["kl_divergence"])


def test_the_router_stays_in_16_bit_and_the_result_says_so(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen2_moe", tmp_path / "model"), tmp_path / "out"
    done(*run_words("gptq", model, out, ids))
    result = json.loads((out / "quantkit.json").read_text())
    assert {row["kind"] for row in result["layers"]}.isdisjoint({"gate", "shared_expert_gate"})
    assert "4 small linears stay in 16 bit, as in engines: gate, shared_expert_gate" in " ".join(result["fallbacks"])
    experts = [row for row in result["layers"] if ".experts." in row["name"]]
    assert len(experts) == 2 * 8 * 3
    per_layer = 6 * 32 * 2  # the tokens of the calibration set, each sent to two experts
    for layer in (1, 2):
        assert sum(r["tokens"] for r in experts if r["layer"] == layer and r["kind"] == "down_proj") == per_layer


def test_experts_that_see_few_tokens_or_none_keep_their_function(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "model", num_experts=24, num_hidden_layers=2)
    few, many = tmp_path / "few.safetensors", tmp_path / "many.safetensors"
    save_file({"input_ids": random_ids(1, 10) % 96}, few)
    save_file({"input_ids": random_ids(12, 64) % 96}, many)
    recipe = tmp_path / "recipe.yaml"  # for the experts alone
    recipe.write_text('rules: [{match: "*.self_attn.*", keep: 16bit}]')
    for method in ("rtn", "gptq", "awq"):
        words = run_words(
            method, model, tmp_path / method, many, "--calib", str(few), "--recipe", str(recipe), "--asym"
        )
        done(*words, "--format", "gptq", "--calib", str(few))
    for method in ("gptq", "awq"):
        experts = [row for row in records(tmp_path / method) if ".experts." in row["name"]]
        assert any(row["tokens"] == 0 for row in experts)
        assert all(row["fallback"] in ("layer", "nearest") for row in experts)
        assert kl(tmp_path / method) < 1.05 * kl(tmp_path / "rtn")


@pytest.mark.parametrize("tokens", [0, 400])
def test_a_starved_expert_leans_on_its_layer_or_is_rounded_to_nearest(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(16, 64, generator=generator), torch.randn(64, 64, generator=generator)

    def read(count: int) -> SiteStats:
        x = torch.randn(count, 64, generator=generator) @ mixing
        return collect([x] if count else [], 64, torch.device("cpu"))

    evidence = Evidence(read(0), read(0), read(tokens), read(tokens // 3))
    site = SiteInput({"up": weight}, {"up": Scheme(4, 32, True)}, read(0), None)
    result = round_starved(QUANTIZE["gptq"], site, Options(tune=True), evidence)
    assert result.records["up"]["fallback"] == ("layer" if tokens else "nearest")
    assert result.offsets["up"].shape == weight.shape
    rounded = dequantize(result.quantized["up"])
    assert float((rounded - weight).square().mean()) < 0.05  # by no means zeros


def test_the_report_and_the_card_say_what_experts_saw(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen2_moe", tmp_path / "model"), tmp_path / "out"
    done(*run_words("gptq", model, out, ids))
    report, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "Tokens of experts" in report
    assert "model.layers.1.mlp.experts.*.gate_proj" in report
    assert "model.layers.1.mlp.experts.3.gate_proj" not in report
    assert "calibrated on the tokens sent to each" in card
    few = sum("fallback" in row for row in records(out))
    assert f"{few} linears of experts saw fewer than 2 calibration tokens for each input" in card


@pytest.mark.parametrize(
    "words",
    [
        ("gptq", "--inputs", "original", "--group", "32"),
        ("sweep", "--method", "gptq", "--w-bit", "4", "--group", "32"),
        ("allocate", "--weights-only", "--budget", "150KiB", "--menu", "W4g32,16bit", "--probe-samples", "2"),
    ],
    ids=lambda words: words[0],
)
def test_what_does_not_take_experts_yet_says_so(words: tuple[str, ...], ids: Path, tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "model")
    fixed = ["--calib", str(ids), "--eval", str(ids), "--device", "cpu", "--out", str(tmp_path / "out.yaml")]
    answer = quantkit(words[0], str(model), *fixed, *words[1:])
    assert answer.returncode == 1
    assert "does not take mixtures of experts yet" in " ".join(answer.stderr.split())


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(ids: Path, tmp_path: Path) -> None:
    model, whole, half = saved("qwen3_moe", tmp_path / "model"), tmp_path / "whole", tmp_path / "half"
    done(*run_words("awq", model, whole, ids))
    shutil.copytree(whole, half)
    journal = half / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(f'"{unit}"' in line for unit in ("layer.1", "layer.2", "head"))]
    assert len(kept) < len(lines)
    journal.write_text("".join(kept))
    done(*run_words("awq", model, half, ids))
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (half / path.name).read_bytes()


def test_experts_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"num_local_experts": 7}, "mlp.gate.weight has shape [8, 64], config.json asks for [7, 64]"),
        ({"num_local_experts": 9}, "experts.8.gate_proj.weight is missing"),
        ({"moe_intermediate_size": 16}, "config.json asks for [16, 64]"),
    ):
        folder = saved("qwen3_moe", tmp_path / words[:5])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError) as refused:
            open_model(folder)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    folder = saved("granitemoe", tmp_path / "stacked")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 7}))
    with pytest.raises(
        ModelError, match=r"input_linear.weight has shape \[8, 64, 64\], config.json asks for \[7, 64, 64\]"
    ):
        open_model(folder)


def test_experts_may_be_stacked_in_the_file(tmp_path: Path) -> None:
    folder = saved("qwen3_5_moe_text", tmp_path)
    ids = random_ids(2) % 96
    expected = stream_logits(open_model(folder), ids)
    tensors = load_file(folder / "model.safetensors")
    for block in {found[0] for name in tensors if (found := expert_of(name.removesuffix(".weight")))}:
        gate, up, down = (
            torch.stack([tensors.pop(f"{block}.{number}.{leaf}.weight") for number in range(8)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        tensors |= {f"{block}.gate_up_proj": torch.cat([gate, up], 1), f"{block}.down_proj": down}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(stream_logits(open_model(folder), ids), expected)


def test_a_router_that_gives_no_numbers_is_named(ids: Path, tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    answer = quantkit(*run_words("gptq", model, tmp_path / "out", ids))
    assert answer.returncode == 1
    assert "model.layers.1.mlp.gate.weight" in answer.stderr
    assert len(answer.stderr.split("quantkit: ")[1].strip().splitlines()) <= 4


def test_recipes_give_experts_bits_of_their_own(ids: Path, tmp_path: Path) -> None:
    model, out, recipe = saved("qwen2_moe", tmp_path / "model"), tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text('rules: [{match: "*.experts.*", bits: 3}, {match: "*.shared_expert.*", bits: 8}]')
    done(*run_words("rtn", model, out, ids, "--recipe", str(recipe), "--format", "compressed-tensors"))
    bits = {row["name"]: row["bits"] for row in records(out)}
    assert {bits[name] for name in bits if expert_of(name)} == {3}
    assert {bits[name] for name in bits if ".shared_expert." in name} == {8}
    assert bits["model.layers.1.self_attn.q_proj"] == 4
    recipe.write_text('rules: [{match: "*.experts.5.*", bits: 3}]')
    words = run_words("rtn", model, tmp_path / "other", ids, "--recipe", str(recipe), "--format", "compressed-tensors")
    answer = quantkit(*words)
    assert answer.returncode == 1
    assert "engines fuse them, so give both one scheme" in " ".join(answer.stderr.split())
