# SPDX-License-Identifier: Apache-2.0
"""What vLLM adds to a checkpoint's bytes: the memory it takes beside weights and KV cache, by flags and geometry.

    python benchmarks/engine_memory.py --budget 22GiB --out engine_memory.json      # where vLLM and a GPU are at hand

A few layers of a real geometry and vocabulary get random weights, are rounded, and are loaded by vLLM held to the
budget. What it logs is kept: GiB of the model as loaded, GiB left for the KV cache, tokens of it. The rest is what
activations, the sampler and libraries take, by the widths and the flags. CUDA graphs grow with the layers, too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.units import parse_bytes


class Case(NamedTuple):
    """recipe: whose geometry; method, words: how it is rounded; tokens, sequences: of a batch; eager: not compiled."""

    recipe: str
    method: str
    words: tuple[str, ...]
    tokens: int
    sequences: int
    eager: bool = False


ASYM, SYM = ("--format", "awq"), ("--format", "gptq", "--sym")
CASES = (
    Case("deepseek-r1-32b", "rtn", ASYM, 2048, 8),
    Case("deepseek-r1-32b", "rtn", ASYM, 8192, 32),
    Case("deepseek-r1-32b", "rtn", ASYM, 2048, 8, eager=True),
    Case("deepseek-r1-32b", "rtn", SYM, 2048, 8),
    Case("deepseek-r1-14b", "rtn", ASYM, 2048, 8),
    Case("deepseek-r1-14b", "rtn", (*SYM, "--w-bit", "8"), 2048, 8),
    Case("deepseek-r1-7b", "rtn", ASYM, 2048, 8),
    Case("deepseek-r1-7b", "rtn", ASYM, 8192, 32),
)
LOAD = """
import json, sys
import torch
from vllm import LLM
said = json.loads(sys.argv[1])
LLM(model=said["folder"], skip_tokenizer_init=True, enforce_eager=said["eager"], max_model_len=2048, dtype="float16",
    max_num_seqs=said["sequences"], max_num_batched_tokens=said["tokens"], seed=0,
    gpu_memory_utilization=said["budget"] / torch.cuda.get_device_properties(0).total_memory)
"""
LOGGED = {
    "model_gib": r"Model loading took ([\d.]+) GiB",
    "kv_gib": r"Available KV cache memory: (-?[\d.]+) GiB",
    "kv_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "graphs_gib": r"Graph capturing finished in .* took (-?[\d.]+) GiB",
}


def measure(case: Case, slab: Path, work: Path, budget: int) -> dict[str, Any]:
    """The figures of one case; `log` has the end of vLLM's output where it did not start."""
    out = work / "-".join((case.recipe, *case.words)).replace("/", "_")
    if not (out / "quantkit.json").is_file():
        words = [case.method, str(slab), *case.words, "--no-verify", "--device", "cuda:0", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "quantkit", *words], check=True, capture_output=True)
    said = {**case._asdict(), "folder": str(out), "budget": budget}
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    words = [sys.executable, "-c", LOAD, json.dumps(said)]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    text = answer.stdout + answer.stderr
    row: dict[str, Any] = case._asdict()
    for name, pattern in LOGGED.items():
        match = re.search(pattern, text)
        row[name] = None if match is None else match[1].replace(",", "")
    if row["kv_gib"] is None:
        return row | {"log": text[-2000:]}
    row["beside_gib"] = round(budget / 2**30 - float(row["model_gib"]) - float(row["kv_gib"]), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="22GiB")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--out", type=Path, default=Path("engine_memory.json"))
    said = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            slab = Path(folder) / case.recipe
            if not slab.is_dir():
                size = ["--layers", str(said.layers), "--vocabulary", str(said.vocabulary)]
                words = [case.recipe, *size, "--folder", str(slab), "--build"]
                subprocess.run([sys.executable, "benchmarks/slab.py", *words], check=True, capture_output=True)
            rows.append(measure(case, slab, Path(folder), parse_bytes(said.budget, "--budget")))
            print(json.dumps(rows[-1]), flush=True)
            said.out.write_text(json.dumps({"layers": said.layers, "budget": said.budget, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
