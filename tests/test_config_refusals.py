# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be quantized here are refused at the door, in one line that names the kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from quantkit.errors import ModelError
from quantkit.model.config import load_config
from quantkit.model.skeleton import build

CHECKED_BY_5 = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="transformers 4 reads it later")

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
AWQ = {"quant_method": "awq", "bits": 4}


def write(folder: Path, config: Any) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as refused:
        build(load_config(folder))
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(folder))
    return message.replace(str(folder), "FOLDER")


def test_the_config_that_the_others_are_made_from_is_accepted(tmp_path: Path) -> None:
    architecture = build(load_config(write(tmp_path, QWEN2)))
    assert len(architecture.layers) == 2
    assert architecture.layers_name == "model.layers"
    assert all(parameter.is_meta for parameter in architecture.model.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "jetmoe", "num_hidden_layers": 2}, ["jetmoe", "mixture of experts (num_local_experts=8)"]),
        ({"model_type": "t5", "is_encoder_decoder": True}, ["t5", "encoder-decoder"]),
        ({"model_type": "bart", "is_encoder_decoder": True}, ["bart", "encoder-decoder"]),
        ({"model_type": "bart"}, ["bart", "encoder-decoder"]),
        ({"model_type": "florence2"}, ["florence2", "encoder-decoder"]),
        (QWEN2 | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, ["'mine'", "never run"]),
        (QWEN2 | {"quantization_config": AWQ}, ["already quantized", "awq", "16-bit"]),
        (QWEN2 | {"quantization_config": {"bits": 4}}, ["already quantized", "unknown method"]),
        (QWEN2 | {"quantization_config": "gptq"}, ["already quantized"]),
        (QWEN2 | {"compression_config": {"quant_method": "compressed-tensors"}}, ["already quantized"]),
        ({key: value for key, value in QWEN2.items() if key != "model_type"}, ["no model_type", "qwen2"]),
        (QWEN2 | {"model_type": ""}, ["no model_type"]),
        (QWEN2 | {"model_type": 7}, ["no model_type"]),
        (QWEN2 | {"model_type": None}, ["no model_type"]),
        (QWEN2 | {"model_type": "zephyrus9"}, ["'zephyrus9'", "not a causal language model", "update transformers"]),
        (QWEN2 | {"model_type": "bert_" * 1000}, ["not a causal language model"]),
        (QWEN2 | {"model_type": "vit"}, ["'vit'", "not a causal language model"]),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}, ["Conv1D"]),
    ],
    ids=lambda value: value.get("model_type", "none") if isinstance(value, dict) else "",
)
def test_kinds_that_are_not_supported_are_named(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(write(tmp_path, config))
    assert all(word in message for word in words), message


def test_the_refusal_of_a_kind_names_the_folder(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, {"model_type": "t5", "is_encoder_decoder": True})).startswith("FOLDER: ")


@pytest.mark.parametrize(
    "changes",
    [
        {key: value}
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        for value in ("x", -1, 0, 2.5, [2], {"a": 1}, True)
    ],
    ids=str,
)
def test_sizes_that_are_no_positive_numbers_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    message = refusal(write(tmp_path, QWEN2 | changes))
    assert next(iter(changes)) in message
    assert "config.json" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"intermediate_size": -5},
        {"intermediate_size": "wide"},
        {"hidden_act": "no such function"},
        {"rope_scaling": {"rope_type": "no such rope"}},
        pytest.param({"layer_types": ["full_attention"]}, marks=CHECKED_BY_5),
        pytest.param({"layer_types": ["no such attention"] * 2}, marks=CHECKED_BY_5),
        pytest.param({"rms_norm_eps": "small"}, marks=CHECKED_BY_5),
        {"max_position_embeddings": "long"},
        pytest.param({"dtype": "float99"}, marks=CHECKED_BY_5),
        {"pad_token_id": 4096},
    ],
    ids=str,
)
def test_values_that_do_not_fit_together_are_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    assert "config.json" in refusal(write(tmp_path, QWEN2 | changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["cannot be read as JSON"]),
        ("{not json", ["cannot be read as JSON"]),
        ('{"model_type": "qwen2"', ["cannot be read as JSON"]),
        ("[1, 2]", ["expected a JSON object", "list"]),
        ('"qwen2"', ["expected a JSON object", "str"]),
        ("null", ["expected a JSON object"]),
        ("[" * 100_000, ["cannot be read as JSON"]),
        ("{}", ["no model_type"]),
    ],
)
def test_files_that_are_not_json_objects(text: str, words: list[str], tmp_path: Path) -> None:
    message = refusal(write(tmp_path, text))
    assert all(word in message for word in [*words, "FOLDER/config.json"]), message


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as JSON" in refusal(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").mkdir()
    assert "config.json: cannot be read" in refusal(tmp_path)


def test_code_from_the_model_folder_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass C: pass\n")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    refusal(write(tmp_path, QWEN2 | {"model_type": "own_kind", "auto_map": auto}))
    build(load_config(write(tmp_path, QWEN2 | {"auto_map": auto})))
    assert not ran.exists()
