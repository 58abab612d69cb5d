# SPDX-License-Identifier: Apache-2.0
"""In what two tokenizers differ: their tokens, how they cut text, special tokens, the chat template.

Versions of the tokenizers library and of transformers write one tokenizer in many ways. So what counts is what two of
them make of texts, and not how their files say it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantkit.errors import ModelError
from quantkit.jsonfile import read_object
from quantkit.model.tokenizer import CONFIG, chat_template_of

TOKENIZER = "tokenizer.json"
VOCABULARIES = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")  # of tokenizers without such a file
SPECIAL = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token")
SAME_FIELDS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
# Texts that tokenizers cut in different ways: numbers, contractions, cases, spaces, lines, scripts, code, accents.
PROBES = (
    "Hello, World! It's 1234567 o'clock; they'LL pay $3.50 -- don't you?",
    "  two  spaces,\ttabs\t\tand\n\nlines \r\n  end   ",
    "def f(x):\n    return x**2 + 0x1F  # café, naïve, Straße, ﬁne, e\u0301",
    "camelCase HTTPServer snake_case UPPER a1b2c3 12,345.678 2026-12-01",
    "Привет, мир. 你好,世界!今天是星期二。 こんにちは 안녕하세요 مرحبا שלום नमस्ते",
    "😀👩‍👩‍👧 — “quotes” … ½ ² \u00a0\u200b\u2028<|endoftext|></s><s>[INST] </think>",
)


def tokenizer_differences(directory: Path, original: Path) -> list[str]:
    """One line for each thing in which a folder's tokenizer is another than the original's.

    What a folder does not hold is not compared: whoever serves it takes that from the original.
    """
    return [*_files(directory, original), *_special(directory, original), *_template(directory, original)]


def _files(directory: Path, original: Path) -> list[str]:
    paths = [folder / TOKENIZER for folder in (directory, original)]
    if not all(path.is_file() for path in paths):
        pairs = [(directory / name, original / name) for name in VOCABULARIES]
        both = [(own, right) for own, right in pairs if own.is_file() and right.is_file()]
        return [
            f"{own.name} is not that of the original" for own, right in both if own.read_bytes() != right.read_bytes()
        ]
    contents = [path.read_bytes() for path in paths]
    if contents[0] == contents[1]:
        return []
    own, expected = map(_load, paths)
    if own is None or expected is None:  # a kind that this version of tokenizers does not know
        return [] if _parts(contents[0]) == _parts(contents[1]) else [f"{TOKENIZER} is not that of the original"]
    tokens, known = own.get_vocab(), expected.get_vocab()
    others = [token for token in tokens.keys() | known.keys() if tokens.get(token) != known.get(token)]
    if others:
        token = min(others, key=lambda token: (known.get(token, len(known)), token))
        return [f"{TOKENIZER}: {len(others)} tokens have other numbers than in the original, for example {token!r:.40}"]
    for text in PROBES:
        for added in (False, True):
            ids, right = (_ids(each, text, added) for each in (own, expected))
            if ids != right:
                parts = ", ".join(_changed_parts(contents))
                return [
                    f"{TOKENIZER}: cuts text into other tokens than the original's ({parts}): {text!r:.40} into "
                    f"{len(ids or ())}, and {len(right or ())} in the original"
                ]
            if ids and own.decode(ids) != expected.decode(ids):
                return [f"{TOKENIZER}: turns tokens into other text than the original's (decoder)"]
    return []


def _load(path: Path) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it raises bare Exceptions, and a panic of its Rust is none at all
        return None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str, added: bool) -> list[int] | None:
    """The tokens of a text; None: the tokenizer has none for it."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=added).ids)
    except Exception:  # a library's bare one, as of a vocabulary without an unknown token
        return None


def _parts(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return {key: found.get(key) for key in SAME_FIELDS} if isinstance(found, dict) else None


def _changed_parts(contents: list[bytes]) -> list[str]:
    own, expected = (_parts(content) or {} for content in contents)
    return [key for key in SAME_FIELDS if own.get(key) != expected.get(key)]


def _config(directory: Path) -> Mapping[str, Any]:
    path = directory / CONFIG
    return read_object(path, "copy it anew from the model's source", ModelError) if path.is_file() else {}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _special(directory: Path, original: Path) -> list[str]:
    own, expected = _config(directory), _config(original)
    pairs = [(key, _text(own.get(key)), _text(expected.get(key))) for key in SPECIAL if own and expected]
    return [
        f"{CONFIG}: {key} is {value!r:.40}, and {right!r:.40} in the original"
        for key, value, right in pairs
        if value is not None and right is not None and value != right
    ]


def _template(directory: Path, original: Path) -> list[str]:
    own, expected = chat_template_of(directory), chat_template_of(original)
    if own is None or expected is None or own.strip() == expected.strip():
        return []
    return ["the chat template is not that of the original"]
