# SPDX-License-Identifier: Apache-2.0
"""The demo model that ships: small, loadable without a network, trained, and what its card says it is."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit

DEMO = Path(quantkit.__file__).parent / "demo"
CARD = (DEMO / "README.md").read_text(encoding="utf-8")
FILES = {
    "LICENSE",
    "NOTICE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Written for this test, in the manner of the four kinds of text the model was trained on.
SNIPPETS = {
    "prose": "This proposal adds a new method to the standard library. The method returns the first element of the "
    "list, or raises an error if the list is empty. Existing code is not affected, because the name of the method "
    "is not used anywhere else. The rationale for this change is described in the following sections.\n",
    "code": 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file as a list."""\n'
    "    with open(path, encoding=encoding) as f:\n        return [line.rstrip() for line in f]\n\n\n"
    'if __name__ == "__main__":\n    import sys\n    for name in sys.argv[1:]:\n        print(read_lines(name))\n',
    "chinese": "数据库的索引可以提高查询的性能,但是也会占用更多的存储空间。如果一个线程需要访问共享的数据,"
    "就需要使用锁来保证线程安全。\n",
}
QUESTION = "A box holds 12 pencils. Mia buys 3 boxes and gives 6 pencils to her brother. How many pencils are left?"


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True)
    return loaded.float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def perplexity(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def test_the_folder_is_complete_and_small() -> None:
    found = {path.name for path in DEMO.iterdir()}
    assert found == FILES
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 10_000_000


def test_it_is_the_qwen2_that_the_card_claims(model: Any) -> None:
    claimed = re.search(r"Qwen2 model of ([\d,]+) parameters", CARD)
    assert claimed is not None
    assert model.num_parameters() == int(claimed[1].replace(",", ""))
    assert model.config.model_type == "qwen2"
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_the_weights_are_stored_in_bfloat16_and_the_head_once() -> None:
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_groups_up_to_256_divide_every_linear(model: Any) -> None:
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert {m.in_features % 256 for m in linears} == {0}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_it_has_learned(model: Any, tokenizer: Any, kind: str) -> None:
    ids = tokenizer(SNIPPETS[kind], return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=generator)]
    value = perplexity(model, ids)
    assert value < model.config.vocab_size / 50  # an untrained model is at the size of its vocabulary
    assert value < perplexity(model, shuffled) / 4  # and it is the order that it knows, not the words alone


def test_the_tokenizer_gives_every_text_back(tokenizer: Any) -> None:
    text = "".join(SNIPPETS.values()) + "\t x  = 3.14159\r\n ünïcode 🙂 <think>\nso</think>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < len(tokenizer) == json.loads((DEMO / "config.json").read_text())["vocab_size"]


def test_marks_of_the_chat_are_single_tokens(tokenizer: Any) -> None:
    for mark in ("<|endoftext|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"):
        assert len(tokenizer(mark).input_ids) == 1, mark
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0


def test_it_answers_in_the_form_of_its_chat_template(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == f"<|User|>{QUESTION}<|Assistant|><think>\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=160, do_sample=False)[0, ids.shape[1] :])
    assert re.search(r"</think>\s+\*\*[\d,.]+\*\*<\|endoftext\|>$", answer), answer


def test_rounding_to_fewer_bits_costs_more(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("".join(SNIPPETS.values()), return_tensors="pt").input_ids
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    original = [m.weight.data for m in linears]
    values = [perplexity(model, ids)]
    try:
        for bits in (4, 3, 2):
            for linear, weight in zip(linears, original, strict=True):
                grouped = weight.reshape(len(weight), -1, 128)  # [out, groups, 128]
                scale = grouped.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
                codes = torch.round(grouped / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                linear.weight.data = (codes * scale).view_as(weight)
            values.append(perplexity(model, ids))
    finally:
        for linear, weight in zip(linears, original, strict=True):
            linear.weight.data = weight
    assert all(more > 1.02 * less for less, more in pairwise(values)), values


def test_the_card_names_its_licences_and_its_numbers() -> None:
    assert CARD.startswith("---\nlicense: apache-2.0\n")
    assert (DEMO / "LICENSE").read_text().lstrip().startswith("Apache License")
    notice = (DEMO / "NOTICE").read_text()
    sources = re.findall(r"^\| \w+ \| \[([\w/-]+)\]\(https://\S+\) \| (\S.*?) \|", CARD, re.MULTILINE)
    assert len(sources) == 8
    assert all(source in notice and licence for source, licence in sources)
    measured = {kind: float(value) for kind, value in re.findall(r"^\| (\w+) \| ([\d.]+) \|$", CARD, re.MULTILINE)}
    assert {"all", "chinese", "code", "prose", "reasoning"} <= measured.keys()
    assert measured["none"] == measured["all"] < measured["4"] < measured["3"] < measured["2"]
