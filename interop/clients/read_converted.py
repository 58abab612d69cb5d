# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own converter on checkpoints made for other engines, to float32, and llama.cpp on what comes of it."""

import contextlib
import importlib
import sys
from pathlib import Path
from unittest import mock

from client import Forward, read
from read_llamacpp import load as load_gguf

(SOURCE,) = Path(sys.prefix).glob("source/*/vendor/llama.cpp")
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]

conversion, converter = map(importlib.import_module, ("conversion.base", "convert_hf_to_gguf"))


def load(checkpoint: Path) -> Forward:
    path = Path(sys.argv[2]) / f"{checkpoint.name}.gguf"
    words = ["convert_hf_to_gguf", str(checkpoint), "--outfile", str(path), "--outtype", "f32"]
    # It knows tokenizers by a hash of what released ones make of a text, and none that was trained for a small model.
    known = mock.patch.object(conversion.TextModel, "get_vocab_base_pre", return_value="qwen2")
    with known, mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(sys.stderr):
        converter.main()
    forward = load_gguf(path)
    path.unlink()  # it is mapped by now
    return forward


if __name__ == "__main__":
    read(("llama-cpp-python", "transformers"), load)
