# SPDX-License-Identifier: Apache-2.0
"""GGUF files by themselves: of llama.cpp, several or in parts, of types that are not read; and back to 16 bit."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from transformers import AutoTokenizer

from quantkit.commands.conversion import ExportRequest
from quantkit.commands.convert_gguf import to_gguf
from quantkit.gguf.file import GGUFFile, open_gguf
from quantkit.gguf.folder import tokenizer_files
from quantkit.gguf.tokenizer import GPT2, PRE_TOKENIZERS, WHOLE_WORDS, tokenizer_metadata
from quantkit.model.tokenizer_differences import tokenizer_differences
from tests.gguf_models import QUIET, tiny
from tests.running import done, quantkit
from tests.tiny import load_whole

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@torch.no_grad()
def by_the_package(path: Path, original: Path, ids: torch.Tensor) -> float:
    """The perplexity of a file of llama.cpp (qwen2) in plain transformers, read by the `gguf` package."""
    whole: Any = load_whole(original)
    for tensor in GGUFReader(path).tensors:
        with np.errstate(all="ignore"):
            values = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type)))
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk.") and name.split(".")[2] in NAMES and tensor.name.endswith(".weight"):
            layer = whole.model.layers[int(name.split(".")[1])]
            layer.get_submodule(NAMES[name.split(".")[2]]).weight.data = values
        elif name == "token_embd":
            whole.model.embed_tokens.weight.data = values
        elif name == "output":
            whole.lm_head.weight.data = values
    if whole.config.tie_word_embeddings:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    return float(whole(ids, labels=ids).loss.exp())


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS"])
def test_files_of_llama_cpp_are_measured(shared: Path, tmp_path: Path, ids: Path, name: str) -> None:
    path = shared / "cases" / "llamacpp-files" / f"g-{name}.gguf"
    original = shared / "cases" / "qwen2-2layer-original"
    if not path.is_file():
        pytest.skip(f"no {path}")
    loose = ["--max-ppl-increase", "9900%", "--max-kl", "99", "--device", "cpu", "--json"]
    answer = quantkit("verify", str(path), "--against", str(original), "--eval", str(ids), *loose)
    assert answer.returncode in (0, 3), answer.stderr
    measured = json.loads(answer.stdout)["verification"]
    assert "differences" not in measured
    expected = by_the_package(path, original, load_file(ids)["input_ids"].long())
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert "qwen2" in done("inspect", str(path)).stdout
    assert json.loads(done("fit", str(path), "--json").stdout)["fits"]
    done("convert", str(path), "--to", "fp16", "--out", str(tmp_path / "out"))
    plain = load_file(tmp_path / "out" / "model-00002-of-00004.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(plain, open_gguf(path).read("blk.0.ffn_up.weight").half())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a GGUF file of it."""
    folder, out = tmp_path_factory.mktemp("model") / "model", tmp_path_factory.mktemp("made") / "made"
    tiny(folder, "llama")
    to_gguf(
        ExportRequest(str(folder), "convert", type="q8_0", nearest=True, out=out, offline=True, verify=False), QUIET
    )
    return folder, next(out.glob("*.gguf"))


@torch.no_grad()
def test_a_file_becomes_a_16_bit_model_by_itself(tmp_path: Path, made: tuple[Path, Path]) -> None:
    model, file = made
    shutil.copy(file, tmp_path / "alone.gguf")
    done("convert", str(tmp_path / "alone.gguf"), "--to", "fp16", "--out", str(tmp_path / "out"))
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model))
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert config[key] == pytest.approx(expected[key]), key
    assert tokenizer_differences(tmp_path / "out", model) == []
    text = "12 tokens, and <|User|> 😀"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (tmp_path / "out", model)]
    assert ids[0] == ids[1]
    tokens = torch.arange(64).view(2, 32)
    logits = [load_whole(folder)(tokens).logits for folder in (tmp_path / "out", model)]
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.05  # 8 bits


@pytest.mark.parametrize("name", ["smollm", "tekken", "llama-bpe", "gpt-2"])
def test_tokenizers_go_into_a_file_and_come_out(tmp_path: Path, name: str) -> None:
    expressions = next(key for key, value in PRE_TOKENIZERS.items() if value == name)
    model = tiny(tmp_path / "model", "llama")
    content = json.loads((model / "tokenizer.json").read_text())
    splits = [{"type": "Split", "pattern": {"Regex": e}, "behavior": "Removed", "invert": True} for e in expressions]
    splits = [split for split in splits if split["pattern"] != {"Regex": GPT2}]
    if name == "smollm":
        splits = [{"type": "Digits", "individual_digits": True}]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2 in expressions}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, last]}
    content["normalizer"] = None
    content["model"]["ignore_merges"] = name in WHOLE_WORDS
    (model / "tokenizer.json").write_text(json.dumps(content))
    raw = json.loads((model / "config.json").read_text())
    metadata = tokenizer_metadata(model, raw["vocab_size"], raw)
    assert metadata["tokenizer.ggml.pre"] == name
    (tmp_path / "out").mkdir()
    for file, written in tokenizer_files(GGUFFile(tmp_path / "x.gguf", metadata, {}, {})).items():
        (tmp_path / "out" / file).write_text(json.dumps(written))
    assert tokenizer_differences(tmp_path / "out", model) == []


def test_other_targets_say_the_way(tmp_path: Path, made: tuple[Path, Path]) -> None:
    answer = quantkit("convert", str(made[1]), "--to", "gptq", "--out", str(tmp_path / "out"))
    assert answer.returncode == 1
    assert "--to fp16" in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["verify", "inspect", "fit"])
def test_several_files_and_parts_are_named(tmp_path: Path, made: tuple[Path, Path], command: str) -> None:
    for names, says in (
        (("a.gguf", "b.gguf"), ("a.gguf, b.gguf", "name one of them")),
        (("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), ("in parts", "llama-gguf-split --merge")),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            shutil.copy(made[1], folder / name)
        against = ["--against", str(made[0])] if command == "verify" else []
        answer = quantkit(command, str(folder), *against)
        assert answer.returncode == 1
        assert answer.stderr.count("\n") == 1
        assert all(part in answer.stderr for part in says), answer.stderr
    alone = quantkit("fit", str(tmp_path / "m-00001-of-00002.gguf" / "m-00001-of-00002.gguf"))
    assert alone.returncode == 1
    assert "merge" in alone.stderr


def test_a_type_that_is_not_read_is_named(tmp_path: Path, made: tuple[Path, Path]) -> None:
    raw = bytearray(made[1].read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two sizes
    raw[place : place + 4] = struct.pack("<I", 16)
    (tmp_path / "x.gguf").write_bytes(raw)
    answer = quantkit("inspect", str(tmp_path / "x.gguf"))
    assert answer.returncode == 1
    assert "blk.0.ffn_up.weight" in answer.stderr
    assert "iq2_xxs" in answer.stderr
