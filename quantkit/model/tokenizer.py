# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model's folder: loaded when text is to be tokenized, and never made up."""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.errors import InputError

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


def tokenizer_of(directory: Path) -> Callable[[], PreTrainedTokenizerBase]:
    """A function that loads the tokenizer of a model directory; it raises InputError if there is none."""

    def load() -> PreTrainedTokenizerBase:
        if not any(path.is_file() for pattern in VOCABULARIES for path in directory.glob(pattern)):
            # transformers would make an empty one up for some architectures
            raise InputError(
                f"{directory}: no tokenizer (tokenizer.json or a vocabulary); "
                "copy it there, or give --calib and --eval as .safetensors files of token ids"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise InputError(
                f"{directory}: no tokenizer that transformers can load ({reason}); "
                "give --calib and --eval as .safetensors files of token ids"
            ) from error
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    return load
