# SPDX-License-Identifier: Apache-2.0
"""The files of a model's folder that a GGUF file stands for: config.json and the tokenizer, from its metadata alone."""

from collections.abc import Mapping
from typing import Any

from quantkit.dtypes import SERVED
from quantkit.errors import ModelError
from quantkit.gguf.architecture import ROPE_FACTORS
from quantkit.gguf.file import GGUFFile
from quantkit.gguf.tokenizer import CONTROL, GPT2, PRE_TOKENIZERS, UNUSED, USER_DEFINED, WHOLE_WORDS
from quantkit.model.architectures import FAMILIES

TOKENIZER = "tokenizer.ggml."


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The content of config.json that the file's metadata says.

    Raises:
        ModelError: an architecture without names of llama.cpp's, or one that the metadata does not say whole.
    """
    arch = file.metadata.get("general.architecture")
    rows = {kind: row.gguf for kind, row in FAMILIES.items() if row.gguf is not None}
    kind = next((kind for kind, row in rows.items() if row.name == arch), None)
    if kind is None:
        known = ", ".join(sorted({row.name for row in rows.values()}))
        raise ModelError(f"{file.path}: architecture {arch!r:.40}: expected {known}")
    if ROPE_FACTORS in file.infos:
        raise ModelError(f"{file.path}: {ROPE_FACTORS} holds factors that no config.json can say; give --against MODEL")
    raw: dict[str, Any] = {"model_type": kind, "hidden_act": "silu", "torch_dtype": SERVED}
    for key, attribute in rows[kind].keys.items():
        value = file.metadata.get(f"{arch}.{key}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None:
            if type(value) not in (int, float) or value <= 0:
                raise ModelError(f"{file.path}: {arch}.{key}: expected a positive number, got {value!r:.60}")
            raw[attribute] = value
    heads = raw.get("num_attention_heads")
    if heads and raw.get("head_dim") == raw.get("hidden_size", 0) // heads:
        del raw["head_dim"]
    if "token_embd.weight" in file.infos:
        raw["vocab_size"] = file.infos["token_embd.weight"].shape[0]
    raw["tie_word_embeddings"] = "output.weight" not in file.infos
    if "blk.0.attn_q.bias" in file.infos:
        raw["attention_bias"] = True
    raw |= _rope_scaling(file, f"{arch}.rope.scaling.")
    for name in ("bos", "eos"):
        if type(index := file.metadata.get(f"{TOKENIZER}{name}_token_id")) is int:
            raw[f"{name}_token_id"] = index
    return raw


def _rope_scaling(file: GGUFFile, prefix: str) -> dict[str, Any]:
    kind, factor = (file.metadata.get(f"{prefix}{name}") for name in ("type", "factor"))
    if kind not in ("linear", "yarn") or factor in (None, 1.0):
        return {}
    more = {"original_context_length": "original_max_position_embeddings"}
    lengths = {name: file.metadata[f"{prefix}{key}"] for key, name in more.items() if f"{prefix}{key}" in file.metadata}
    return {"rope_scaling": {"rope_type": kind, "factor": factor} | (lengths if kind == "yarn" else {})}


def tokenizer_files(file: GGUFFile) -> dict[str, dict[str, Any]]:
    """The JSON files of the tokenizer, by name; none for a kind that is not written here."""
    metadata = file.metadata
    name, tokens = metadata.get(f"{TOKENIZER}pre"), metadata.get(f"{TOKENIZER}tokens")
    expressions = next((key for key, value in PRE_TOKENIZERS.items() if value == name), None)
    if metadata.get(f"{TOKENIZER}model") != "gpt2" or expressions is None or not isinstance(tokens, list):
        return {}
    kinds = metadata.get(f"{TOKENIZER}token_type") or [1] * len(tokens)
    added = [index for index, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, number in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"{TOKENIZER}{number}_token_id")
        if type(index) is int and index < len(tokens):
            config[f"{key}_token"] = tokens[index]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, tokens[index], special=kinds[index] == CONTROL) for index in added],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(expressions),
        "post_processor": _post_processor(metadata, config),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": list(metadata.get(f"{TOKENIZER}merges") or []),
        },
    }
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _added(index: int, text: str, *, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **plain, "special": special}


def _pre_tokenizer(expressions: tuple[str, ...]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
        if expression != GPT2
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": GPT2 in expressions}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


def _post_processor(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Puts the tokens before and after a text that llama.cpp puts there."""
    names = [name for name in ("bos", "eos") if metadata.get(f"{TOKENIZER}add_{name}_token")]
    used = {name: config[f"{name}_token"] for name in names if f"{name}_token" in config}
    if not used:
        return None
    ids = {token: metadata[f"{TOKENIZER}{name}_token_id"] for name, token in used.items()}

    def around(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        first, last = ([{"SpecialToken": {"id": used[n], "type_id": 0}}] if n in used else [] for n in ("bos", "eos"))
        return [*first, *parts, *last]

    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": around(sequences[0]),
        "pair": around(*sequences),
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in ids.items()},
    }
