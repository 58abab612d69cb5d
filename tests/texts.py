# SPDX-License-Identifier: Apache-2.0
"""Texts, chat templates, and a small tokenizer for the tests of calibration."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
KEEPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}{{ eos_token }}\n"
    "{% else %}{{ raise_exception('no such role: ' + m.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As in DeepSeek-R1: the reasoning of a past turn is dropped, the prompt for the next begins it.
STRIPS = KEEPS.replace("<|assistant|>{{ m.content }}", "<|assistant|>{{ m.content.split('</think>')[-1] }}")
STRIPS_AND_BEGINS = STRIPS.replace("prompt %}<|assistant|>{%", "prompt %}<|assistant|><think>\\n{%").replace(
    "\\n", "\n"
)

CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "<think>\nTwo and two make four.\n</think>\n\n**4**"},
]


def make_tokenizer(*, template: str | None = None, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens that puts bos before a text, as Llama's does."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["the model reads one layer at a time and the layer is written " * 4], trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    names = ({"bos_token": BOS} if bos else {}) | ({"eos_token": EOS} if eos else {})
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=32, **names)
    wrapped.chat_template = template
    return wrapped


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    """Write records as JSON lines, compressed as the name says."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path
