# SPDX-License-Identifier: Apache-2.0
"""Small real models, made in the test run and saved as any model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)  # tests run side by side
settings.register_profile("quantkit", deadline=None)  # a busy machine is no failure
settings.load_profile("quantkit")

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def make_qwen2(
    folder: Path, *, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """A random Qwen2 with biases that are not zero, saved to `folder`."""
    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**(TINY | {"num_hidden_layers": layers} | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def make_tokenizer(folder: Path, vocab_size: int = 96) -> None:
    """A tokenizer of single characters, beside the model in `folder`."""
    characters = [chr(code) for code in range(32, 32 + vocab_size - 1)]
    vocab = {"<|endoftext|>": 0} | {character: i + 1 for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 in several shards, with a tokenizer."""
    folder = make_qwen2(tmp_path_factory.mktemp("qwen2"))
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random token ids [6, 32] for the tiny models."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({"input_ids": torch.randint(0, 96, (6, 32), generator=generator)}, path)
    return path


@pytest.fixture
def shared() -> Path:
    """The folder of shared models and data; tests that need it skip where it is not."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no shared models at {SHARED}")
    return SHARED
