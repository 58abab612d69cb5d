# SPDX-License-Identifier: Apache-2.0
"""Whole GGUF files as transformers reads them, what is in their header, and rounding straight into them.

llama.cpp itself runs in the interop suite.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig

from quantkit.commands.conversion import ExportRequest
from quantkit.commands.convert_gguf import to_gguf
from quantkit.commands.quantize import quantize
from quantkit.errors import InputError, ModelError
from quantkit.formats.blocks import pack
from quantkit.gguf.architecture import rope_factors
from quantkit.gguf.file import TensorInfo, Value, open_gguf, write_gguf
from quantkit.gguf.reading import open_gguf_model
from quantkit.gguf.tokenizer import GPT2, PRE_TOKENIZERS, pre_tokenizer, tokenizer_metadata
from quantkit.model.streaming import open_model
from quantkit.quantized import open_quantized
from quantkit.settings.request import Request
from tests.gguf_models import (
    DEMO,
    IDS,
    INTEGERS,
    QUIET,
    as_the_model_with,
    as_transformers_reads,
    parameter_names,
    random_integers,
    tiny,
)


def test_a_file_is_as_the_package_reads_it_and_the_same_every_time(tmp_path: Path) -> None:
    metadata: dict[str, Value] = {
        "general.architecture": "llama", "a.text": "naïve", "a.flag": True, "a.number": 7, "a.real": 0.5,
        "a.texts": ["x", "yy"], "a.numbers": [1, -2]}  # fmt: skip
    infos = [TensorInfo("one", "f32", (3,)), TensorInfo("two", "q8_0", (2, 32))]
    blocks = pack(random_integers(INTEGERS["q8_0"], 2, 32), "q8_0")
    data = [("one", [torch.arange(3.0)]), ("two", [blocks[:1], blocks[1:]])]
    digest = write_gguf(tmp_path / "a.gguf", metadata, infos, data)
    assert write_gguf(tmp_path / "b.gguf", metadata, infos, data) == digest
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("one", "F32", [3]), ("two", "Q8_0", [32, 2])]  # fmt: skip
    assert reader.tensors[0].data.tolist() == [0, 1, 2]
    assert torch.equal(torch.from_numpy(reader.tensors[1].data.copy()), blocks)
    assert {key: reader.fields[key].contents() for key in metadata} == metadata
    own = open_gguf(tmp_path / "a.gguf")
    assert dict(own.metadata) == metadata
    assert torch.equal(own.read_blocks("two"), blocks)


@pytest.mark.parametrize("length", [3, 20, 60, 200, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.gguf"
    infos = [TensorInfo("one", "f32", (64,))]
    write_gguf(path, {"general.architecture": "llama", "x": ["a"] * 9}, infos, [("one", [torch.zeros(64)])])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"a\.gguf"):
        open_gguf(path)


WIDE_HEADS = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # which the reader takes for granted


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", WIDE_HEADS), ("llama", {}),
     ("llama", {"attention_bias": True, "rope_theta": 500000.0})],
)  # fmt: skip
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder, out = tiny(tmp_path / "model", kind, **changes), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", symmetric=False, out=out,
                    offline=True, verify=False)  # fmt: skip
    result = quantize(asked, QUIET)[0].content()
    assert (result["format"], result["scheme"]["group_size"]) == ("gguf", 32)
    assert result["gguf"] == {
        "file": "out.gguf",
        "bytes": (out / "out.gguf").stat().st_size,
        "types": ["q4_1"],
        "equal": 14,
    }
    assert result["total_bytes"] == result["gguf"]["bytes"]
    assert result["bits_per_weight"] == 5
    original = open_model(folder)
    written = open_gguf_model(out / "out.gguf", original)
    assert result["tensor_bytes"] == sum(written.stored().tensors.values())
    weights = written.read(parameter_names(original))
    stored = open_quantized(out).read(parameter_names(original))
    assert all(torch.equal(weights[name], stored[name].float()) for name in weights)
    if changes.get("attention_bias"):
        return  # transformers' reader drops llama's biases
    ours, theirs = as_the_model_with(weights, folder, IDS), as_transformers_reads(out / "out.gguf", IDS)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5


def test_a_16_bit_model_becomes_k_quants(tmp_path: Path) -> None:
    folder, ids = tiny(tmp_path / "model", "llama"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    common: dict[str, Any] = {"type": "q4_k", "calib": str(ids), "samples": 2, "seqlen": 24, "offline": True,
                              "evaluation": str(ids)}  # fmt: skip
    made, out = to_gguf(ExportRequest(str(folder), "convert", out=tmp_path / "a", **common), QUIET)
    result = made.content()
    (path,) = out.glob("*.gguf")
    assert result["bits_per_weight"] == 4.5
    assert len(result["layers"]) == 14
    assert result["verification"]["kl_divergence"] > 0
    assert not list(out.glob("*.safetensors"))
    original = open_model(folder)
    weights = open_gguf_model(path, original).read(parameter_names(original))
    ours, theirs = as_the_model_with(weights, folder, IDS), as_transformers_reads(path, IDS)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    other = tmp_path / "b"
    to_gguf(ExportRequest(str(folder), "convert", out=other, **common), QUIET)
    whole = next(other.glob("*.gguf")).read_bytes()
    assert whole[-4096:] == path.read_bytes()[-4096:]
    assert len(whole) == path.stat().st_size
    with pytest.raises(InputError, match="--type"):
        to_gguf(ExportRequest(str(folder), "convert", type="q3_x", out=tmp_path / "c"), QUIET)


def test_rotations_of_llama_3_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters=dict(rope), max_position_embeddings=131072
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.allclose(plain / factors, expected, rtol=1e-5)


def test_pre_tokenizers_go_by_their_expression(tmp_path: Path) -> None:
    demo = json.loads((DEMO / "tokenizer.json").read_text())
    assert pre_tokenizer(demo, "demo") == "qwen2"
    for expressions, name in PRE_TOKENIZERS.items():
        changed = json.loads(json.dumps(demo))
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated"} for e in expressions if e != GPT2
        ]
        changed["pre_tokenizer"]["pretokenizers"][:-1] = splits
        changed["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = GPT2 in expressions
        assert pre_tokenizer(changed, "changed") == name
        for split in splits:  # what is between the pieces is removed: nothing
            split |= {"behavior": "Removed", "invert": True}
        assert pre_tokenizer(changed, "changed") == name
    changed["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    assert pre_tokenizer(changed, "changed") == "smollm"  # as SmolLM2 says it
    changed["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})
    with pytest.raises(ModelError, match="name for its pre-tokenizer is not known"):
        pre_tokenizer(changed, "changed")
    with pytest.raises(ModelError, match="expected a byte-level BPE"):
        pre_tokenizer(demo | {"model": {"type": "WordLevel"}}, "words")


def test_deepseeks_distilled_qwen_has_its_own_name(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    bos = "<｜begin▁of▁sentence｜>"
    tokenizer["added_tokens"].append({"id": 4100, "content": bos, "special": True})
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {"bos_token": {"content": bos}, "eos_token": "<|endoftext|>", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    found = tokenizer_metadata(tmp_path, 4104, {"pad_token_id": 2})
    assert found["tokenizer.ggml.pre"] == "deepseek-r1-qwen"
    ids = [found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")]
    assert ids == [4100, 0, 2]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == "{{ x }}"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert (tokens[4096], kinds[4096], kinds[4100], kinds[4094], kinds[50]) == ("[PAD4096]", 5, 3, 4, 1)
    with pytest.raises(ModelError, match="has token 4100, but the model's vocabulary ends at 4099"):
        tokenizer_metadata(tmp_path, 4100, {})


def test_the_tokenizer_in_the_file_encodes_alike(tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "model", "qwen2"), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", out=out, offline=True, verify=False)
    quantize(asked, QUIET)
    mine = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="out.gguf")
    for text in ("Hello, world! It's 2026.", "def f(x):\n    return x + 1\n", "naïve 中文 🦙 'RE", "  \n\n\t a"):
        assert theirs.encode(text, add_special_tokens=False) == mine.encode(text, add_special_tokens=False)
    assert isinstance(mine.backend_tokenizer, Tokenizer)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    changes = ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding window of 16")
    path.write_text(json.dumps(plain | changes[0]))
    asked = ExportRequest(str(folder), "convert", out=tmp_path / "out", offline=True)
    with pytest.raises(ModelError, match=changes[1]):
        to_gguf(asked, QUIET)
    path.write_text(json.dumps(plain))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        to_gguf(asked, QUIET)
