# SPDX-License-Identifier: Apache-2.0
"""The tokenizer as llama.cpp has it: the tokens, merges and special tokens of a byte-level BPE, and the chat template.

llama.cpp knows pre-tokenizers by name and holds their expressions itself. The converter that comes with it finds the
name by hashing what a tokenizer makes of a text, which ties it to vocabularies it has seen; here the expression in
tokenizer.json itself is looked up.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.gguf.file import Value
from quantkit.model.tokenizer import chat_template_of

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of a ByteLevel step itself
PRE_TOKENIZERS = {  # the expressions that a tokenizer cuts by, one after the other -> the name
    (rf"{_WORDS}|\p{{N}}{_REST}",): "qwen2",
    (rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}",): "llama-bpe",
    (rf"{_CASES}|\p{{N}}{_REST}".replace(r"[\r\n]*", r"[\r\n/]*"),): "tekken",  # Mistral Nemo, and those after it
    (DIGIT, GPT2): "smollm",
    (GPT2,): "gpt-2",
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # llama.cpp takes a word that is a token as it is, without merging
DEEPSEEK_BOS = "<｜begin▁of▁sentence｜>"  # Qwen's expression with this token: the distilled models of DeepSeek-R1
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def tokenizer_metadata(directory: Path, vocab_size: int, config: Mapping[str, Any]) -> dict[str, Value]:
    """The `tokenizer.` keys for a model directory with a tokenizer.json.

    vocab_size: rows of the embedding: ids beyond the tokenizer's become unused tokens; config: config.json's content

    Raises:
        ModelError: no tokenizer.json, one that is not a byte-level BPE, or a pre-tokenizer that has no name here.
    """
    path = directory / "tokenizer.json"
    tokenizer = _object(path)
    if tokenizer is None:
        raise ModelError(f"{directory}: no tokenizer.json; gguf needs it: save the tokenizer with transformers")
    said = _object(directory / "tokenizer_config.json") or {}
    model = tokenizer.get("model") or {}
    name = pre_tokenizer(tokenizer, str(path))
    tokens, kinds = _tokens(tokenizer, vocab_size, str(path))
    if name == "qwen2" and DEEPSEEK_BOS in tokens:
        name = "deepseek-r1-qwen"
    ids = _special_ids(tokens, kinds, said, config)
    result: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(pair) for pair in model.get("merges") or []],
    }
    result |= {f"tokenizer.ggml.{SPECIAL[key]}_token_id": value for key, value in ids.items()}
    first, last = _added(tokenizer, said, tokens, ids)
    result |= {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    template = chat_template_of(directory)
    return result | ({"tokenizer.chat_template": template} if template else {})


def pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text before it merges.

    Raises:
        ModelError: it is not a byte-level BPE, or cuts in a way that has no name here.
    """
    model, pre = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre]) if isinstance(pre, Mapping) else []
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if model.get("type") != "BPE" or not byte_level:
        raise ModelError(f"{where}: expected a byte-level BPE; llama.cpp's other tokenizers are not written here")
    expressions = tuple(expression for step in steps for expression in _expressions(step))
    found = PRE_TOKENIZERS.get(expressions)
    if found is None or byte_level[0].get("add_prefix_space", False):
        shown = " ".join(expressions) or str([step.get("type") for step in steps])
        raise ModelError(
            f"{where}: llama.cpp's name for its pre-tokenizer is not known ({shown:.120}); "
            f"known are those of {', '.join(PRE_TOKENIZERS.values())}"
        )
    return found


def _expressions(step: Mapping[str, Any]) -> list[str]:
    """What a step of a pre-tokenizer cuts out; its kind where that is not known here."""
    kind, keeps = step.get("type"), (step.get("behavior"), bool(step.get("invert")))
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGIT]
    if kind == "Split" and keeps in (("Isolated", False), ("Removed", True)):  # one as the other: nothing is between
        return [str((step.get("pattern") or {}).get("Regex"))]
    return [f"{kind} {step.get('behavior') or ''}".strip()]


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, where: str) -> tuple[list[str], list[int]]:
    """Text and kind of every id; added tokens are control tokens if they are special, or look as if they were."""
    vocabulary = {int(index): text for text, index in tokenizer["model"]["vocab"].items()}
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens") or []}
    most = max([*vocabulary, *added], default=-1)
    if most >= vocab_size:
        raise ModelError(f"{where}: has token {most}, but the model's vocabulary ends at {vocab_size - 1}")
    tokens, kinds = [], []
    for index in range(vocab_size):
        if index in added:
            text = str(added[index]["content"])
            looks = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
            tokens.append(text)
            kinds.append(CONTROL if added[index].get("special") or looks else USER_DEFINED)
        elif index in vocabulary:
            tokens.append(vocabulary[index])
            kinds.append(NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            kinds.append(UNUSED)
    return tokens, kinds


def _merge(pair: str | list[str]) -> str:
    """Two tokens with a space between them, as tokenizer.json had them before it wrote lists."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _special_ids(
    tokens: list[str], kinds: list[int], said: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """By the tokenizer's own config, and where it does not say, the model's."""
    ids = {text: index for index, text in enumerate(tokens) if kinds[index] in (CONTROL, USER_DEFINED)}
    found = {}
    for key in SPECIAL:
        token = said.get(f"{key}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        index = ids.get(text) if isinstance(text, str) else None
        default = config.get(f"{key}_token_id")
        default = default[0] if isinstance(default, list) and default else default
        if index is None and type(default) is int and 0 <= default < len(tokens):
            index = default
        if index is not None:
            found[key] = index
    return found


def _added(
    tokenizer: Mapping[str, Any], said: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int]
) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and eos after it."""
    post = tokenizer.get("post_processor") or {}
    steps = post.get("processors", [post])
    template = next((step.get("single") or [] for step in steps if step.get("type") == "TemplateProcessing"), None)
    if template is None:
        return bool(said.get("add_bos_token")), bool(said.get("add_eos_token"))

    def is_special(piece: Mapping[str, Any], key: str) -> bool:
        return key in ids and (piece.get("SpecialToken") or {}).get("id") == tokens[ids[key]]

    found = len(template) > 1
    return found and is_special(template[0], "bos"), found and is_special(template[-1], "eos")
