# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on the GGUF files that quantkit writes: logits, perplexity, greedy continuation and tokens; makes GGUF.md.

    python -m interop.llamacpp

llama.cpp's CPU kernels round the inputs of quantized linears to 8 bits, so its logits cannot be those of a forward in
float32, whatever the file holds. What the file holds is therefore shown twice: as it is, and with the same weights
written as float32 (`twin`), which llama.cpp multiplies without rounding anything.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop.pairs import MODELS
from interop.run import WORK, client, figures, token_files
from quantkit.export_gguf import ExportRequest, to_gguf
from quantkit.gguf.file import GGUFFile, TensorInfo, open_gguf, write_gguf
from quantkit.gguf.reading import open_gguf_model
from quantkit.model.streaming import open_model
from quantkit.runs import Request, quantize

TABLE = Path(__file__).parent / "GGUF.md"
PROMPT, NEW = 48, 64
QUIET = Console(quiet=True)
CALIBRATION = {"samples": 32, "seqlen": 512, "offline": True, "verify": False}
RUNS: dict[str, dict[str, Any]] = {  # name -> what is asked of a run
    "gptq W8 sym (q8_0)": {"method": "gptq", "bits": 8},
    "gptq W4 sym (q4_0)": {"method": "gptq", "bits": 4, "symmetric": True},
    "awq W4 asym (q4_1)": {"method": "awq", "bits": 4, "symmetric": False},
}
BLOCKS = {"from 16 bit (q4_k)": "q4_k", "from 16 bit (q6_k)": "q6_k"}
HEADER = f"""\
# What llama.cpp makes of our GGUF files

Made by `python -m interop.llamacpp`: llama.cpp on a CPU (llama-cpp-python) against the original architecture in float32
on the weights that quantkit reads from the same file. llama.cpp's kernels for quantized weights round their inputs to 8
bits, and that is all by which the first row of each pair differs: the second is the same weights written as float32.
greedy: share of {NEW} greedy tokens of llama.cpp after each prompt of {PROMPT} that are ours after the same tokens;
free: of two continuations left alone, where one other token changes all that follow. The tokens of a few texts are
compared as well, and are equal.

| file | max logit difference | KL | perplexity, ours | llama.cpp | top-1 | greedy | free |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
TEXTS = [
    "Hello, world! It's 2026.",
    "def f(x):\n    return x + 1\n",
    "naïve 中文 🦙 'RE",
    "  \n\n\t a",
    "<|User|>Hi<|Assistant|>",
]


def make(name: str, model: str) -> Path:
    """The GGUF file of a row."""
    folder = WORK / "gguf" / f"{model}-{name.partition('(')[2].strip(')')}"
    if name in RUNS:
        asked = Request(model=str(MODELS[model]), command=name, format="gguf", out=folder, **RUNS[name], **CALIBRATION)
        quantize(asked, QUIET)
    else:
        to_gguf(ExportRequest(str(MODELS[model]), name, type=BLOCKS[name], out=folder, **CALIBRATION), QUIET)
    return next(folder.glob("*.gguf"))


def twin(path: Path) -> Path:
    """The same file with every weight as float32."""
    file: GGUFFile = open_gguf(path)
    target = path.with_name(f"{path.stem}-f32.gguf")
    infos = [TensorInfo(info.name, "f32", info.shape) for info in file.infos.values()]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, dict(file.metadata), infos, ((info.name, [file.read(info.name)]) for info in infos))
    return target


@torch.inference_mode()
def compare(path: Path, weights: Path, model: str, out: Path, ids: Tensor, prompts: Tensor) -> dict[str, float]:
    """llama.cpp's answers for a file against the original architecture in float32 on the weights in `weights`."""
    original = open_model(MODELS[model])
    ours = AutoModelForCausalLM.from_pretrained(MODELS[model], dtype=torch.float32)
    state = open_gguf_model(weights, original).read([name for name, _ in ours.named_parameters()])
    ours.load_state_dict(state, strict=False)
    theirs = load_file(out / f"{path.name}.safetensors")["logits"]
    generated = load_file(out / f"{path.name}.tokens.safetensors")["tokens"]
    logits = torch.cat([ours(sample.unsqueeze(0)).logits for sample in ids])
    free = ours.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, PROMPT:]
    followed = ours(torch.cat([prompts, generated], 1)).logits[:, PROMPT - 1 : -1].argmax(-1)
    found = figures(logits, theirs, ids)
    return {
        "error": float((logits - theirs).abs().max() / logits.abs().max()),
        "perplexity_ours": figures(logits, logits, ids)["perplexity"],
        "perplexity": found["perplexity"],
        "kl_divergence": found["kl_divergence"],
        "top1": float((logits.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "greedy": float((followed == generated).float().mean()),
        "free": float((free == generated).float().mean()),
    }


def rows(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file of one model and its twin."""
    ids = load_file(token_files(model).evaluation)["input_ids"]
    out = WORK / "gguf" / f"{model}-answers"
    out.mkdir(parents=True, exist_ok=True)
    prompts = ids[:, :PROMPT].contiguous()
    save_file({"input_ids": prompts}, out / "prompts.safetensors")
    (out / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODELS[model])
    for name in (*RUNS, *BLOCKS):
        path = make(name, model)
        for file, label in ((path, name), (twin(path), f"{name}, its weights as float32")):
            client("llamacpp", "read_llamacpp.py", token_files(model).evaluation, out, str(file))
            found = json.loads((out / f"{file.name}.ids.json").read_text())
            if found != [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]:
                raise ValueError(f"{file}: llama.cpp makes other tokens of {TEXTS}: {found}")
            yield f"{label} ({model})", compare(file, path, model, out, ids, prompts)
            if file != path:
                file.unlink()


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    shutil.rmtree(WORK / "gguf", ignore_errors=True)
    lines = [HEADER]
    for model in (name for name, folder in MODELS.items() if folder.is_dir()):
        for label, found in rows(model):
            print(label, found, flush=True)
            lines.append(
                f"| {label} | {found['error']:.1e} | {found['kl_divergence']:.1e} | {found['perplexity_ours']:.4f} "
                f"| {found['perplexity']:.4f} | {found['top1']:.2%} | {found['greedy']:.2%} | {found['free']:.2%} |"
            )
    TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
