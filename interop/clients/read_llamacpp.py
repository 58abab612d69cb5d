# SPDX-License-Identifier: Apache-2.0
"""llama.cpp itself, through llama-cpp-python, on GGUF files; see client.py.

OUT/prompts.safetensors   if it is there, "input_ids": OUT/NAME.tokens.safetensors gets "tokens" int64 [samples, NEW],
                          after each prompt always the most likely token
OUT/texts.json            if it is there, a list of texts: OUT/NAME.ids.json gets the ids of each
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from client import Forward, read
from llama_cpp import Llama
from safetensors.torch import load_file, save_file

CONTEXT, NEW = 1024, 64
FLOAT32 = 0  # of the KV cache, which is no part of the file


def load(path: Path) -> Forward:
    llama = Llama(
        str(path),
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=1,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    out = Path(sys.argv[2])
    if (out / "prompts.safetensors").is_file():
        prompts = load_file(out / "prompts.safetensors")["input_ids"].tolist()
        tokens = torch.tensor([continued(llama, prompt) for prompt in prompts])
        save_file({"tokens": tokens}, out / f"{path.name}.tokens.safetensors")
    if (out / "texts.json").is_file():
        texts = json.loads((out / "texts.json").read_text())
        ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
        (out / f"{path.name}.ids.json").write_text(json.dumps(ids))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        llama.reset()
        llama.eval(ids[0].tolist())
        return torch.from_numpy(np.array(llama.scores[: ids.shape[1]])).unsqueeze(0)

    return forward


def continued(llama: Llama, prompt: list[int]) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    found: list[int] = []
    while len(found) < NEW:
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(found[-1:])
    return found


read(("llama-cpp-python",), load)
