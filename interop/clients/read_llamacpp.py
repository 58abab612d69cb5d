# SPDX-License-Identifier: Apache-2.0
"""llama.cpp itself, through llama-cpp-python, on GGUF files or folders with one; see client.py.

OUT/prompts.safetensors   if it is there, "input_ids": OUT/NAME.tokens.safetensors gets "exact" and "usual", int64
                          [samples, NEW]: after each prompt always the most likely token
OUT/texts.json            if it is there, a list of texts: OUT/NAME.ids.json gets the ids of each

llama.cpp multiplies quantized weights in two ways. With a BLAS, ROWS tokens and more at once meet weights that were
made float32: "exact", and the logits that are written. Fewer at a time meet the integers, by kernels that round the
tokens' values to 8 bits: "usual", and OUT/NAME.usual.safetensors gets these logits. A continuation goes the first way
when all of the sequence is run again for each new token, and the second when only the new token is.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from client import Forward, read
from llama_cpp import Llama
from safetensors.torch import load_file, save_file

CONTEXT, NEW = 512, 64
ROWS = 32
FLOAT32 = 0  # of the KV cache, which is no part of the file


def load(path: Path) -> Forward:
    if path.is_dir():
        (path,) = path.glob("*.gguf")
    out, ids = Path(sys.argv[2]), load_file(sys.argv[1])["input_ids"]
    exact = opened(path, CONTEXT)
    if (out / "prompts.safetensors").is_file():
        usual = opened(path, ROWS // 2)
        prompts = load_file(out / "prompts.safetensors")["input_ids"].tolist()
        tokens = {
            "exact": torch.tensor([continued(exact, prompt, whole) for prompt in prompts]),
            "usual": torch.tensor([continued(usual, prompt, step) for prompt in prompts]),
        }
        save_file(tokens, out / f"{path.name}.tokens.safetensors")
        logits = torch.cat([logits_of(usual, row.tolist()) for row in ids])
        save_file({"logits": logits}, out / f"{path.name}.usual.safetensors")
    if (out / "texts.json").is_file():
        texts = json.loads((out / "texts.json").read_text())
        found = [exact.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
        (out / f"{path.name}.ids.json").write_text(json.dumps(found))
    return lambda ids: logits_of(exact, ids[0].tolist())


def opened(path: Path, at_once: int) -> Llama:
    """at_once: how many tokens are computed together."""
    return Llama(
        str(path),
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_ubatch=at_once,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )


def logits_of(llama: Llama, ids: list[int]) -> torch.Tensor:
    """[1, tokens, vocabulary]."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)])).unsqueeze(0)


def continued(llama: Llama, prompt: list[int], add: Callable[[Llama, list[int]], None]) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    found: list[int] = []
    while len(found) < NEW:
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        add(llama, prompt + found)
    return found


def whole(llama: Llama, ids: list[int]) -> None:
    llama.reset()
    llama.eval(ids)


def step(llama: Llama, ids: list[int]) -> None:
    llama.eval(ids[-1:])


if __name__ == "__main__":
    read(("llama-cpp-python",), load)
