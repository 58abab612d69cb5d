# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose names are not the model's are read as transformers reads them, or refused in one true line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.model.streaming import open_model
from tests.conftest import make_qwen2
from tests.running import done, quantkit, run_words
from tests.tiny import load_whole, random_ids, save_tiny, stream_logits

Rename = Callable[[str], str | None]


def rename(folder: Path, rename: Rename) -> None:
    """Save the tensors in one file, under other names; None leaves one out."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    renamed = {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def without_base(name: str) -> str:
    return name.partition(".")[2] if name.partition(".")[0] in ("model", "transformer", "gpt_neox") else name


def head_alone(name: str) -> str:
    return "lm_head.weight" if name == "model.embed_tokens.weight" else name


CASES: dict[str, tuple[str, dict[str, Any], Rename]] = {
    "tied, stored as the head": ("qwen2", {"tie_word_embeddings": True}, head_alone),
    "tied gemma, stored as the head": ("gemma", {"head_dim": 16}, head_alone),
    "saved from the base model": ("qwen2", {"tie_word_embeddings": True}, without_base),
    "saved from the base model, with a head": ("llama", {"tie_word_embeddings": False}, without_base),
    "another base": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 48}, without_base),
    "a renamed head": ("gpt_neox", {"hidden_size": 64}, lambda name: name),
    "a renamed head, from the base": ("gpt_neox", {"hidden_size": 64}, without_base),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_same(case: str, tmp_path: Path) -> None:
    kind, changes, names = CASES[case]
    save_tiny(tmp_path, kind, **changes)
    ids = random_ids(3)
    with torch.no_grad():
        expected = load_whole(tmp_path)(ids).logits
    rename(tmp_path, names)
    model = open_model(tmp_path)
    assert model.ignored == ()
    torch.testing.assert_close(stream_logits(model, ids), expected, rtol=0, atol=1e-4)


def test_a_run_writes_the_names_that_engines_know(ids: Path, tmp_path: Path) -> None:
    model, out = make_qwen2(tmp_path / "model", tie_word_embeddings=True), tmp_path / "out"
    done(*run_words("rtn", model, tmp_path / "before", ids))
    rename(model, head_alone)
    done(*run_words("rtn", model, out, ids))
    for path in (tmp_path / "before").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_quantized_checkpoint_is_read_alike(ids: Path, tmp_path: Path) -> None:
    model, out = make_qwen2(tmp_path / "model", tie_word_embeddings=True), tmp_path / "out"
    done(*run_words("gptq", model, out, ids))
    before = json.loads((out / "quantkit.json").read_text())["verification"]
    for name in ("quantkit.json", "journal.jsonl"):
        (out / name).unlink()
    rename(out, head_alone)
    words = ["--against", str(model), "--eval", str(ids), "--max-ppl-increase", "900%", "--json"]
    after = json.loads(done("verify", str(out), *words).stdout)["verification"]
    assert after["kl_divergence"] == pytest.approx(before["kl_divergence"], rel=1e-5)
    done("convert", str(out), "--to", "compressed-tensors", "--out", str(tmp_path / "converted"))
    assert done("fit", str(out), "--budget", "1GiB", "--json").returncode == 0
    assert done("inspect", str(out), "--json").returncode == 0


@pytest.mark.parametrize("config", [False, True])
def test_a_lora_folder_says_what_to_do(ids: Path, tmp_path: Path, config: bool) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    if config:
        (folder / "config.json").write_bytes((make_qwen2(tmp_path / "base") / "config.json").read_bytes())
    refused = quantkit(*run_words("rtn", folder, tmp_path / "out", ids))
    assert refused.returncode == 1
    assert "a LoRA adapter of org/base; merge it into its model first" in refused.stderr
