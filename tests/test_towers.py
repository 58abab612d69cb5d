# SPDX-License-Identifier: Apache-2.0
"""Text decoders with a vision tower beside them: the decoder is quantized, all else stays as it is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from quantkit.formats import FORMATS
from quantkit.model.streaming import open_model
from quantkit.plan import make_plan
from quantkit.quantized import open_quantized
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit
from tests.running import done, quantkit, run_words
from tests.tiny import load_whole, random_ids, save_tiny, save_tiny_tower, stream_logits, tiny_tower

TEXT: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16}
VERDICTS = (0, 3)  # in random attention heads are alike, and their weights may end far from the original's
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GEMMA4 = WINDOWS | {"hidden_size_per_layer_input": 0, "global_head_dim": 32}
SHARING = {  # embeddings for each layer, and layers that use the keys and values of earlier ones
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
}
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what differs in the decoder, and in the tower
    "gemma4": (GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}, {}),
    "gemma4-sharing": (GEMMA4 | SHARING, {}),
    "gemma3": (WINDOWS, {}),
    "qwen3_5": (DELTA_NET, {}),
    "mistral3": ({}, {}),
    "qwen3_vl": (ROPE, {"deepstack_visual_indexes": [0, 1]}),
    "qwen2_5_vl": (ROPE, {"fullatt_block_indexes": [1]}),
    "muse_glimmer": ({}, {}),
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model, every parameter away from its initial value, with a head that predicts later tokens."""
    text, vision = TOWERS[kind]
    kind = kind.partition("-")[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    save_tiny_tower(folder, tiny_tower(kind, TEXT | text, vision), dtype)
    file = folder / "model.safetensors"
    later = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(64)}
    save_file(load_file(file) | {name: tensor.to(dtype) for name, tensor in later.items()}, file, {"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "any"}')
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", TOWERS)
def test_streamed_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    ids = random_ids(5)
    with torch.no_grad():
        expected = load_whole(tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(stream_logits(open_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "fmt"), [("rtn", "gptq"), ("gptq", "compressed-tensors"), ("awq", "awq")])
@pytest.mark.parametrize("kind", TOWERS)
def test_the_decoder_is_quantized_and_all_else_is_as_it_was(
    kind: str, method: str, fmt: str, ids: Path, tmp_path: Path
) -> None:
    model, out = saved(kind, tmp_path / "model", torch.bfloat16), tmp_path / "out"
    assert quantkit(*run_words(method, model, out, ids, "--format", fmt)).returncode in VERDICTS
    result = json.loads((out / "quantkit.json").read_text())
    opened = open_model(model)
    assert len(result["layers"]) == sum(map(len, opened.layer_linears)) - 2 * 2 * (kind == "qwen3_5")
    before, after = stored(model), stored(out)
    assert opened.copied.keys() >= {"mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"}
    for name in opened.copied:
        assert after[name].dtype == before[name].dtype == torch.bfloat16
        assert torch.equal(after[name].view(torch.int16), before[name].view(torch.int16))
    written = json.loads((out / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == len(opened.layers)
    assert written["torch_dtype"] == "bfloat16"
    assert (out / "preprocessor_config.json").is_file()
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    answer = quantkit(*verify)
    assert answer.returncode in VERDICTS
    measured = json.loads(answer.stdout)["verification"]["kl_divergence"]
    assert measured == result["verification"]["kl_divergence"]


def test_transformers_computes_from_the_files_what_was_measured(ids: Path, tmp_path: Path) -> None:
    for kind in ("gemma3", "qwen3_5", "gemma4-sharing"):
        model, out = saved(kind, tmp_path / kind), tmp_path / f"{kind}-out"
        words = run_words("gptq", model, out, ids, "--format", "compressed-tensors")
        assert quantkit(*words).returncode in VERDICTS
        tokens, original = random_ids(2), open_model(model)
        with torch.no_grad():
            expected = load_whole(out)(input_ids=tokens).logits
        found = stream_logits(original, tokens, quantized=open_quantized(out))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_other_commands_read_the_result(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen3_5", tmp_path / "model", torch.bfloat16), tmp_path / "out"
    done(*run_words("rtn", model, out, ids))
    shown = json.loads(done("inspect", str(out), "--json").stdout)
    assert shown["format"] == "awq"
    needed = json.loads(done("fit", str(out), "--budget", "1GiB", "--context", "16", "--json").stdout)
    planned = json.loads(
        done("fit", str(model), "--group", "32", "--budget", "1GiB", "--context", "16", "--json").stdout
    )
    assert needed["kv_bytes"] == planned["kv_bytes"]
    copied = sum(tensor.nbytes for name, tensor in stored(model).items() if name in open_model(model).copied)
    assert needed["weights"]["total"] > copied
    again = tmp_path / "again"
    done("convert", str(out), "--to", "compressed-tensors", "--out", str(again))
    ignored = json.loads((again / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"mtp.layers.0.mlp.up_proj", "model.visual.blocks.0.attn.qkv", "lm_head"} <= set(ignored)
    assert stored(again)["mtp.norm.weight"].equal(stored(model)["mtp.norm.weight"])


def test_each_layer_is_asked_what_it_keeps_of_a_token(tmp_path: Path) -> None:
    """Of six layers the last two use the keys and values of earlier ones; every other one has a window of 8 tokens."""
    model = open_model(saved("gemma4-sharing", tmp_path))
    plan = make_plan(model, lambda name, layer: Scheme(4, 32, True), FORMATS["awq"])
    sliding, full = 2 * 2 * 2 * 16, 2 * 2 * 2 * 32
    for context in (4, 100):
        found = fit(model, plan, budget=2**30, context=context).kv_bytes
        assert found == 2 * sliding * min(context, 8) + 2 * full * context


def test_a_head_of_its_own_is_kept_where_the_config_does_not_say_so(ids: Path, tmp_path: Path) -> None:
    model, out = saved("mistral3", tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    head = 0.05 * torch.randn_like(tensors["language_model.model.embed_tokens.weight"])
    save_file(tensors | {"language_model.lm_head.weight": head}, model / "model.safetensors", {"format": "pt"})
    assert not open_model(model).tied
    done(*run_words("rtn", model, out, ids))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(stored(out)["language_model.lm_head.weight"], head.half())
    done("verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%")


def test_patterns_hold_the_names_of_engines(ids: Path, tmp_path: Path) -> None:
    model, out = saved("qwen3_5", tmp_path / "model"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{kind: down_proj, bits: 8}]")
    done(*run_words("gptq", model, out, ids, "--format", "gptq", "--recipe", str(recipe)))
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    (wider,) = (pattern.removeprefix("+:") for pattern, values in dynamic.items() if values.get("bits") == 8)
    for front in ("model.language_model", "language_model.model"):  # of the file, and of vLLM
        assert re.match(wider, f"{front}.layers.1.mlp.down_proj")
        assert not re.match(wider, f"{front}.layers.1.mlp.up_proj")


def test_names_in_files_are_those_of_the_source(ids: Path, tmp_path: Path) -> None:
    """Of a head that transformers names otherwise, and of a checkpoint that was saved without the head around it."""
    neox = save_tiny(tmp_path / "gpt_neox", "gpt_neox", hidden_size=64)
    bare = save_tiny(tmp_path / "qwen2", "qwen2", hidden_size=64, tie_word_embeddings=True)
    tensors = {n.removeprefix("model."): t for n, t in load_file(bare / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    for model in (neox, bare):
        out = tmp_path / f"{model.name}-out"
        done(*run_words("gptq", model, out, ids, "--format", "compressed-tensors"))
        before, after, linears = stored(model), stored(out), open_model(model).layer_linears[0]
        packed = {name.rpartition(".")[0] for name in after if name.endswith(".weight_packed")}
        assert len(packed) == 3 * len(linears)
        assert {name for name in before if name.rpartition(".")[0] not in packed} == {
            name for name in after if name.rpartition(".")[0] not in packed
        }
        assert {f"{name}.weight" for name in packed} <= before.keys()


def test_an_adapter_is_to_be_merged_first(ids: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    answer = quantkit(*run_words("rtn", tmp_path, tmp_path / "out", ids))
    assert answer.returncode == 1
    assert "is a LoRA adapter; merge it into its model first" in " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("name", "billions", "kept"),
    [
        ("qwen3.8-27b", 27.4, 16 * 2 * 4 * 256),  # of 64 layers one in four keeps keys and values
        ("gemma-4-31b", 30.7, 50 * 2 * 16 * 256 + 10 * 2 * 4 * 512),
        ("ministral-3-14b", 13.9, 40 * 2 * 8 * 128),
        ("ministral-3-8b", 8.9, 34 * 2 * 8 * 128),
        ("muse-glimmer-30b", 29.8, 52 * 2 * 2 * 128),
    ],
)
def test_recipes_say_the_published_sizes(name: str, billions: float, kept: int) -> None:
    answer = quantkit("fit", name, "--json", "--context", "1024")
    if "is not a causal language model that transformers" in answer.stderr:
        pytest.skip(f"this transformers does not know {name}")
    found = json.loads(answer.stdout)
    assert round(found["weights_16bit"] / 2e9, 1) == pytest.approx(billions, abs=0.051)
    assert found["kv_bytes_per_token"] == 2 * kept
