# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on the GGUF files that quantkit writes: logits, perplexity, greedy continuation and tokens; makes GGUF.md.

    python -m interop.llamacpp [MODEL ...]      of pairs.MODELS; the demo where none is named

llama.cpp's own kernels for quantized weights round what they multiply with to 8 bits, so no logits of theirs are those
of a forward in float32, whatever the file holds. With a BLAS it multiplies many tokens at once in float32, by the same
weights of the same file: that way shows what the file means to llama.cpp, and the other what its kernels make of it.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop.pairs import MODELS
from interop.run import QUIET, WORK, client, figures, token_files
from quantkit.commands.conversion import ExportRequest
from quantkit.commands.convert_gguf import to_gguf
from quantkit.commands.quantize import quantize
from quantkit.gguf.reading import open_gguf_model
from quantkit.model.streaming import open_model
from quantkit.settings.request import Request

TABLE = Path(__file__).parent / "GGUF.md"
PROMPT, NEW = 48, 64
CALIBRATION: dict[str, Any] = {"samples": 32, "seqlen": 512, "offline": True, "verify": False}
RUNS: dict[str, dict[str, Any]] = {  # name -> what is asked of a run
    "gptq W8 sym (q8_0)": {"method": "gptq", "bits": 8},
    "gptq W4 sym (q4_0)": {"method": "gptq", "bits": 4, "symmetric": True},
    "awq W4 asym (q4_1)": {"method": "awq", "bits": 4, "symmetric": False},
}
BLOCKS = {"from 16 bit (q4_k)": "q4_k", "from 16 bit (q6_k)": "q6_k"}
HEADER = f"""\
# What llama.cpp makes of our GGUF files

Made by `python -m interop.llamacpp`: llama.cpp on a CPU (llama-cpp-python, built with OpenBLAS) against the original
architecture in float32 on the weights that quantkit reads from the same file.

llama.cpp goes two ways. Through the BLAS, 32 tokens and more at once meet weights that were made float32: nothing is
rounded but the weights, and this is what the file says. Its own kernels, for fewer tokens, round the inputs of each
quantized linear to 8 bits in blocks of 32; that alone changes KL and a few most likely tokens, for q8_0 too.

greedy: share of the {NEW} tokens after each of 8 prompts of {PROMPT} that are those of our forward, both left alone;
through the BLAS all of the sequence is run again for each token. followed: of its own kernels' tokens, those that our
forward takes after the same tokens; one other token changes all that follow, which is why greedy is lower. The ids of a
few texts are compared as well, and are equal.

| file | ours | BLAS: logits | KL | perplexity | top-1 | greedy | own KL | perplexity | top-1 | followed | greedy |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
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


@torch.inference_mode()
def compare(path: Path, model: str, out: Path, ids: Tensor, prompts: Tensor) -> dict[str, float]:
    """llama.cpp's answers for a file against the original architecture in float32 on the file's weights."""
    ours: Any = AutoModelForCausalLM.from_pretrained(MODELS[model], dtype=torch.float32)
    state = open_gguf_model(path, open_model(MODELS[model])).read([name for name, _ in ours.named_parameters()])
    ours.load_state_dict(state, strict=False)
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
    tokens = load_file(out / f"{path.name}.tokens.safetensors")
    followed = ours(torch.cat([prompts, tokens["usual"]], 1)).logits[:, PROMPT - 1 : -1].argmax(-1)
    exact = load_file(out / f"{path.name}.safetensors")["logits"]
    usual = load_file(out / f"{path.name}.usual.safetensors")["logits"]
    return {
        "error": float((logits - exact).abs().max() / logits.abs().max()),
        "perplexity_ours": figures(logits, logits, ids)["perplexity"],
        "greedy": _share(free, tokens["exact"]),
        **{f"{name}_exact": value for name, value in _against(logits, exact, ids).items()},
        **{f"{name}_usual": value for name, value in _against(logits, usual, ids).items()},
        "followed_usual": _share(followed, tokens["usual"]),
        "greedy_usual": _share(free, tokens["usual"]),
    }


def _against(ours: Tensor, theirs: Tensor, ids: Tensor) -> dict[str, float]:
    return figures(ours, theirs, ids) | {"top1": _share(ours.argmax(-1), theirs.argmax(-1))}


def _share(ours: Tensor, theirs: Tensor) -> float:
    return float((ours == theirs).float().mean())


def rows(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file of one model."""
    ids = load_file(token_files(model).evaluation)["input_ids"]
    out = WORK / "gguf" / f"{model}-answers"
    out.mkdir(parents=True, exist_ok=True)
    prompts = ids[:, :PROMPT].contiguous()
    save_file({"input_ids": prompts}, out / "prompts.safetensors")
    (out / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODELS[model])
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    for name in (*RUNS, *BLOCKS):
        path = make(name, model)
        answer = client("llamacpp", "read_llamacpp.py", token_files(model).evaluation, out, str(path))
        if answer["said"]:
            raise RuntimeError(f"{path}: llama.cpp says: {answer['said']}")
        found = json.loads((out / f"{path.name}.ids.json").read_text())
        if found != expected:
            raise ValueError(f"{path}: llama.cpp makes other tokens of {TEXTS}: {found}")
        yield f"{name} ({model})", compare(path, model, out, ids, prompts)


def main(models: Sequence[str]) -> None:
    """Write the table."""
    torch.set_num_threads(1)
    shutil.rmtree(WORK / "gguf", ignore_errors=True)
    lines = [HEADER]
    for model in models:
        for label, found in rows(model):
            print(label, found, flush=True)
            lines.append(_row(label, found))
    TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _row(label: str, found: dict[str, float]) -> str:
    cells = [
        f"{found['perplexity_ours']:.4f}",
        f"{found['error']:.1e}",
        f"{found['kl_divergence_exact']:.1e}",
        f"{found['perplexity_exact']:.4f}",
        f"{found['top1_exact']:.2%}",
        f"{found['greedy']:.2%}",
        f"{found['kl_divergence_usual']:.1e}",
        f"{found['perplexity_usual']:.4f}",
        f"{found['top1_usual']:.2%}",
        f"{found['followed_usual']:.2%}",
        f"{found['greedy_usual']:.1%}",
    ]
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:] or ["demo"])
