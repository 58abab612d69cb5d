# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model's folder: loaded when text is to be tokenized, and never made up."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.errors import InputError
from quantkit.jsonfile import read_object
from quantkit.text import clean_line

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
CONFIG_TYPES: dict[str, tuple[type, ...]] = {  # of fields whose type transformers does not check
    "tokenizer_class": (str,),
    "model_max_length": (int, float),
    "added_tokens_decoder": (dict,),
    "auto_map": (dict,),
}
SENTENCEPIECE = b"\n"  # the first byte of such a file; one of tiktoken begins with base64
READERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # what reads it: module -> package
IDS = "give --calib and --eval as .safetensors files of token ids"


def tokenizer_of(directory: Path) -> Callable[[], PreTrainedTokenizerBase]:
    """A function that loads the tokenizer of a model directory.

    It raises InputError if there is none, or none that works.
    """

    def load() -> PreTrainedTokenizerBase:
        if not any(path.is_file() for pattern in VOCABULARIES for path in directory.glob(pattern)):
            # transformers would make an empty one up for some architectures
            raise InputError(f"{directory}: no tokenizer (tokenizer.json or a vocabulary); copy it there, or {IDS}")
        _require_types(directory / CONFIG)
        _require_readers(directory)
        fault = ""
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
            if not tokenizer("word", add_special_tokens=False, verbose=False)["input_ids"]:
                fault = "it gives no tokens for a word"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exceptions, and a panic of its Rust is none at all
            fault = clean_line(error) or type(error).__name__
        if fault:
            again = "update transformers and tokenizers, or " if (directory / "tokenizer.json").is_file() else ""
            raise InputError(
                f"{directory}: no tokenizer that transformers can load ({fault}); copy its files anew, or {again}{IDS}"
            )
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    return load


def _require_types(path: Path) -> None:
    """Raise InputError for a field of tokenizer_config.json, if there is one, that is not of its type."""
    config = read_object(path, "copy it anew from the model's source", InputError) if path.exists() else {}
    for name, types in CONFIG_TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, types):
            expected = " or ".join(kind.__name__ for kind in types)
            raise InputError(f"{path}: {name}: expected {expected}, got {clean_line(repr(value))}; mend it, or {IDS}")


def _require_readers(directory: Path) -> None:
    """Raise InputError for a vocabulary of SentencePiece without the packages that read it."""
    missing = [package for module, package in READERS.items() if not _is_installed(module)]
    if not missing or (directory / "tokenizer.json").is_file():
        return
    for path in sorted(directory.glob("*.model")):
        with path.open("rb") as file:
            if file.read(1) == SENTENCEPIECE:
                raise InputError(f"{path}: reading it needs more packages: pip install {' '.join(missing)}; or {IDS}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in is not installed
        return False


def chat_template_of(directory: Path) -> str | None:
    """The chat template of a model's folder: in a file of its own, or the default one in the tokenizer's config."""
    path = directory / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    config = directory / CONFIG
    content = read_object(config, "copy it anew from the model's source") if config.exists() else {}
    template = content.get("chat_template")
    if isinstance(template, list):
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next((each.get("template") for each in named), None)
    return template if isinstance(template, str) else None
