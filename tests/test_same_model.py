# SPDX-License-Identifier: Apache-2.0
"""`verify` passes only what computes the same: a folder's own config, metadata and tokenizer are run and compared."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from quantkit.commands.conversion import ExportRequest
from quantkit.commands.convert_gguf import to_gguf
from quantkit.gguf.file import open_gguf, write_gguf
from quantkit.model.config import config_from_dict, load_config
from quantkit.model.config_differences import config_differences, contradictions
from quantkit.model.tokenizer_differences import tokenizer_differences
from quantkit.results.folder import quantized_config
from quantkit.scheme import Scheme
from tests.conftest import make_qwen2, make_tokenizer
from tests.tiny import load_whole
from tests.verified import GPTQ, QUIET, verify, write_foreign

LOOSE = {"max_ppl_increase": 99.0, "max_kl": 99.0}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_tokenizer(make_qwen2(folder, hidden_size=256, intermediate_size=256, num_attention_heads=4))
    return folder


@pytest.fixture
def foreign(tmp_path: Path, original: Path) -> tuple[Path, torch.nn.Module]:
    """A checkpoint of another tool, and the model that its weights stand for."""
    whole = write_foreign(tmp_path / "foreign", original, "gptq", Scheme(4, 32, True), GPTQ)
    return tmp_path / "foreign", whole


def say(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        if key == "rope_theta" and isinstance(raw.get("rope_parameters"), dict):
            raw["rope_parameters"][key] = value
        else:
            raw[key] = value
    (folder / "config.json").write_text(json.dumps(raw))


@torch.no_grad()
def perplexity(folder: Path, whole: torch.nn.Module, ids: Path) -> float:
    """What transformers computes with a folder's config and the given weights."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.load_state_dict(whole.state_dict())
    tokens = load_file(ids)["input_ids"].long()
    return float(model.eval()(tokens, labels=tokens).loss.exp())


@pytest.mark.parametrize(
    "values",
    [{"rope_theta": 1e2}, {"rms_norm_eps": 1e-1}, {"hidden_act": "gelu"}, {"eos_token_id": 5}],
    ids=lambda values: next(iter(values)),
)
def test_another_config_fails_with_the_figures_that_transformers_computes(
    foreign: tuple[Path, torch.nn.Module], original: Path, ids: Path, values: dict[str, Any]
) -> None:
    folder, whole = foreign
    say(folder, **values)
    measured = verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    assert measured["perplexity"] == pytest.approx(perplexity(folder, whole, ids), rel=1e-4)
    assert measured["perplexity_fp16"] == pytest.approx(perplexity(original, load_whole(original), ids), rel=1e-4)
    assert measured["verdict"] == "fail"
    (name,) = values
    assert [name in reason for reason in measured["differences"]] == [True]
    assert measured["differences"][0] in measured["reasons"]


def test_equal_configs_in_other_spellings_pass(
    foreign: tuple[Path, torch.nn.Module], original: Path, ids: Path
) -> None:
    folder, _ = foreign
    raw = json.loads((folder / "config.json").read_text())
    theta = (raw.pop("rope_parameters", None) or raw)["rope_theta"]
    for key in ("use_cache", "attention_dropout", "initializer_range", "max_window_layers", "layer_types", "dtype"):
        raw.pop(key, None)
    raw |= {"rope_theta": int(theta), "rope_scaling": None, "torch_dtype": "float16", "hidden_act": "swish"}
    raw |= {"use_sliding_window": False, "attention_dropout": 0.1, "_name_or_path": "elsewhere", "eos_token_id": [0]}
    (folder / "config.json").write_text(json.dumps(raw))
    measured = verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    assert "differences" not in measured
    assert not [reason for reason in measured["reasons"] if "config" in reason]


def test_a_base_that_only_older_readers_take_fails(
    foreign: tuple[Path, torch.nn.Module], original: Path, ids: Path
) -> None:
    folder, _ = foreign
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000}
    (folder / "config.json").write_text(json.dumps(raw))
    assert "differences" not in verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 1e6}))
    measured = verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    assert measured["verdict"] == "fail"
    assert "rope_theta is 1000000.0" in measured["reasons"][0]


def test_scaled_rotations_are_compared_by_value() -> None:
    base = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    older = config_from_dict(base | {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}})
    named = config_from_dict(base | {"rope_theta": 500000, "rope_scaling": scaling | {"type": "llama3"}})
    assert config_differences(named, older) == []
    other = config_from_dict(
        base | {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3", "factor": 32.0}}
    )
    (line,) = config_differences(other, older)
    assert "factor is 32.0, and 8.0 in the original" in line
    plain = config_from_dict(base | {"rope_theta": 5e5})
    assert any("rope_type" in line for line in config_differences(plain, older))


KINDS = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "olmo3",
    "nemotron",
    "qwen3_next",
    "lfm2",
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in CONFIG_MAPPING])
def test_a_config_that_a_run_writes_is_the_originals(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    original = load_config(tmp_path)
    raw = quantized_config(tmp_path, {"quant_method": "gptq"})
    del raw["quantization_config"]
    assert config_differences(config_from_dict(raw), original) == contradictions(raw, config_from_dict(raw)) == []
    older = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    assert config_differences(config_from_dict(older), original) == []


# ---------------------------------------------------------------- tokenizers


def byte_level(folder: Path, digits: str, **changes: Any) -> Path:
    """A folder with a tokenizer of bytes that cuts numbers so."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "12", "123"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("12", "3")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits + r"| ?\p{L}+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "a", "eos_token": "b", "chat_template": "{{ messages }}"} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizers_that_cut_otherwise_are_named(tmp_path: Path) -> None:
    original = byte_level(tmp_path / "original", r"\p{N}")
    (line,) = tokenizer_differences(byte_level(tmp_path / "digits", r"\p{N}{1,3}"), original)
    assert "pre_tokenizer" in line
    (line,) = tokenizer_differences(byte_level(tmp_path / "eos", r"\p{N}", eos_token={"content": "c"}), original)
    assert "eos_token is 'c', and 'b' in the original" in line
    (line,) = tokenizer_differences(byte_level(tmp_path / "chat", r"\p{N}", chat_template="{{ 1 }}"), original)
    assert "chat template" in line


def test_a_tokenizer_spelled_otherwise_is_the_same(tmp_path: Path) -> None:
    original, other = byte_level(tmp_path / "original", r"\p{N}"), byte_level(tmp_path / "other", r"\p{N}")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["padding"] = None
    (other / "tokenizer.json").write_text(json.dumps(content, indent=4))
    (other / "chat_template.jinja").write_text("{{ messages }}\n")
    assert tokenizer_differences(other, original) == []
    (other / "tokenizer.json").unlink()
    assert tokenizer_differences(other, original) == []
    for folder, content in ((original, b"a"), (other, b"b")):
        (folder / "tokenizer.model").write_bytes(content)
    assert tokenizer_differences(other, original) == ["tokenizer.model is not that of the original"]


def test_verify_fails_by_the_tokenizer_alone(
    foreign: tuple[Path, torch.nn.Module], original: Path, ids: Path, tmp_path: Path
) -> None:
    folder, _ = foreign
    shutil.copy(original / "tokenizer.json", folder)
    assert "differences" not in verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["behavior"] = "MergedWithNext"
    content["pre_tokenizer"]["pattern"] = {"String": " "}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    measured = verify(folder, against=str(original), evaluation=str(ids), **LOOSE)["verification"]
    assert measured["verdict"] == "fail"
    assert "tokenizer.json" in measured["reasons"][0]


# ---------------------------------------------------------------- GGUF


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same tensors with other metadata."""
    file = open_gguf(source)
    metadata = dict(file.metadata)
    change(metadata)
    out.mkdir()
    tensors = ((name, [file.read_blocks(name)]) for name in file.infos)
    write_gguf(out / "model.gguf", metadata, list(file.infos.values()), tensors)
    return out


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 16-bit model with a tokenizer that llama.cpp knows, and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    byte_level(folder, r"\p{N}")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    make_qwen2(folder, hidden_size=256, intermediate_size=256, num_attention_heads=4, vocab_size=258)
    out = tmp_path_factory.mktemp("made") / "made"
    asked = ExportRequest(str(folder), "convert", type="q8_0", nearest=True, out=out, offline=True, verify=False)
    to_gguf(asked, QUIET)
    return folder, next(out.glob("*.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "config"),
    [
        ("qwen2.rope.freq_base", 100.0, {"rope_theta": 100.0}),
        ("qwen2.attention.layer_norm_rms_epsilon", 0.1, {"rms_norm_eps": 0.1}),
        ("qwen2.context_length", 64, {}),
        ("tokenizer.ggml.pre", "llama-bpe", {}),
        ("tokenizer.ggml.eos_token_id", 3, {}),
    ],
)
def test_other_metadata_fails_with_the_figures_that_it_computes(
    tmp_path: Path, gguf: tuple[Path, Path], ids: Path, key: str, value: Any, config: dict[str, Any]
) -> None:
    model, file = gguf
    changed = rewritten(file, tmp_path / "changed", lambda metadata: metadata.update({key: value}))
    measured = verify(changed, against=str(model), evaluation=str(ids), **LOOSE)["verification"]
    assert measured["verdict"] == "fail"
    assert [key in reason for reason in measured["differences"]] == [True]
    whole = load_whole(model)
    stored = open_gguf(file)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    for index, layer in enumerate(whole.model.layers):
        for local, name in (names | {"mlp.down_proj": "ffn_down"}).items():
            layer.get_submodule(local).weight.data = stored.read(f"blk.{index}.{name}.weight")
    shutil.copytree(model, tmp_path / "model")
    say(tmp_path / "model", **config)
    assert measured["perplexity"] == pytest.approx(perplexity(tmp_path / "model", whole, ids), rel=1e-4)


def test_unchanged_metadata_passes(tmp_path: Path, gguf: tuple[Path, Path], ids: Path) -> None:
    model, file = gguf
    same = rewritten(file, tmp_path / "same", lambda metadata: metadata.pop("qwen2.rope.dimension_count"))
    measured = verify(same, against=str(model), evaluation=str(ids), **LOOSE)["verification"]
    assert "differences" not in measured
    assert math.isfinite(measured["kl_divergence"])
