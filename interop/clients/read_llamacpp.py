# SPDX-License-Identifier: Apache-2.0
"""llama.cpp itself, through llama-cpp-python, on GGUF files.

python read_llamacpp.py IDS OUT FILE.gguf ...              the logits of each file, see client.py
python read_llamacpp.py --generate N IDS OUT FILE.gguf ... N tokens after each sample, always the most likely one:
                                                           OUT/NAME.safetensors gets "tokens" int64 [samples, N]
python read_llamacpp.py --tokenize TEXTS OUT FILE.gguf ... OUT/NAME.json: the ids of each text of a JSON list
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from client import Forward, read
from llama_cpp import Llama
from safetensors.torch import load_file, save_file

CONTEXT = 1024


def open_llama(path: Path) -> Llama:
    return Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )


def load(path: Path) -> Forward:
    llama = open_llama(path)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        llama.reset()
        llama.eval(ids[0].tolist())
        return torch.from_numpy(np.array(llama.scores[: ids.shape[1]])).unsqueeze(0)

    return forward


def generate(count: int, ids: Path, out: Path, path: Path) -> None:
    llama, rows = open_llama(path), []
    for sample in load_file(ids)["input_ids"].tolist():
        llama.reset()
        llama.eval(sample)
        found: list[int] = []
        while len(found) < count:
            found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(found[-1:])
        rows.append(found)
    save_file({"tokens": torch.tensor(rows)}, out / f"{path.stem}.safetensors")


def tokenize(texts: Path, out: Path, path: Path) -> None:
    llama = Llama(str(path), vocab_only=True, verbose=False)
    found = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in json.loads(texts.read_text())]
    (out / f"{path.stem}.json").write_text(json.dumps(found))


if sys.argv[1] == "--generate":
    for file in sys.argv[5:]:
        generate(int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), Path(file))
elif sys.argv[1] == "--tokenize":
    for file in sys.argv[4:]:
        tokenize(Path(sys.argv[2]), Path(sys.argv[3]), Path(file))
else:
    read(("llama-cpp-python",), load)
