# SPDX-License-Identifier: Apache-2.0
"""The options of the commands: each said once, with its help."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantkit.scheme import NAMED


class FormatName(StrEnum):
    awq = "awq"
    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


class TargetName(StrEnum):
    awq = "awq"
    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"
    fp16 = "fp16"


class Bits(StrEnum):
    two, three, four, eight = "2", "3", "4", "8"


class Kv(StrEnum):
    fp16, fp8 = "fp16", "fp8"


class BlockName(StrEnum):
    q4_0, q4_1, q8_0, q4_k, q5_k, q6_k = "q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k"


class OutsideName(StrEnum):
    f16, q8_0, q6_k = "f16", "q8_0", "q6_k"


class Quality(StrEnum):
    fast, best = "fast", "best"


class Engine(StrEnum):
    vllm, sglang, transformers = "vllm", "sglang", "transformers"
    gptqmodel, llamacpp = "gptqmodel", "llama.cpp"
    llamacpp_too = "llamacpp"  # as it is typed, too


class Kernels(StrEnum):
    vllm, sglang, transformers = "vllm", "sglang", "transformers"
    gptqmodel, llamacpp = "gptqmodel", "llama.cpp"
    llamacpp_too = "llamacpp"
    any = "any"


class ServerEngine(StrEnum):
    vllm, sglang, llamacpp = "vllm", "sglang", "llama.cpp"


class ChatEngine(StrEnum):
    transformers, vllm, sglang, llamacpp = "transformers", "vllm", "sglang", "llama.cpp"


class Searched(StrEnum):
    gptq, awq = "gptq", "awq"


class States(StrEnum):
    auto, device, ram, file = "auto", "device", "ram", "file"


class Inputs(StrEnum):
    quantized, original = "quantized", "original"


class Rounding(StrEnum):
    gptq, nearest = "gptq", "nearest"


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A recipe name (deepseek-r1-32b, demo), a folder, or a hub id (org/name)."),
]
WBit = Annotated[Bits | None, typer.Option("--w-bit", help="Bits of a weight.  [default: 4]")]
Group = Annotated[
    int | None, typer.Option("--group", help="Columns that share a scale; -1: whole rows.  [default: 128]")
]
Sym = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Fixed zero point or one per group.  [default: by method]")
]
SchemeOption = Annotated[
    str | None,
    typer.Option("--scheme", "--type", metavar="NAME", help=f"A scheme by name: {', '.join(NAMED)}."),
]
FormatOption = Annotated[
    FormatName | None, typer.Option("--format", help="How it is stored.  [default: by method and bits]")
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe file: bits and groups by layer and kind.")
]
QualityOption = Annotated[
    Quality, typer.Option("--quality", help="fast: what Gram matrices give; best: each layer tuned by gradients.")
]
Calib = Annotated[str | None, typer.Option("--calib", help="Calibration SOURCE.  [default: mix]")]
FieldOption = Annotated[
    str | None,
    typer.Option("--field", help="Field of the rows of --calib and --eval that holds the text.  [default: the usual]"),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration windows.  [default: 128]")]
Seqlen = Annotated[int | None, typer.Option("--seqlen", min=2, help="Tokens of a window.  [default: 2048]")]
Seed = Annotated[int, typer.Option("--seed", help="Order of the calibration documents.")]
Eval = Annotated[str | None, typer.Option("--eval", help="Evaluation SOURCE.  [default: eval, bundled]")]
EvalSamples = Annotated[
    int | None,
    typer.Option("--eval-samples", min=1, help="Evaluation windows.  [default: all; of the bundled set 65,536 tokens]"),
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Memory that weights, KV cache and workspace may take.  [default: 22GiB]"),
]
Context = Annotated[str | None, typer.Option("--context", help="Tokens of context that must fit.  [default: 8k]")]
KvOption = Annotated[Kv | None, typer.Option("--kv", help="Type of the KV cache.  [default: fp16]")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder.  [default: outputs/...]")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing.")]
Offline = Annotated[bool, typer.Option("--offline", help="Touch no network.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Leave out the comparison with FP16.")]
MaxPpl = Annotated[
    str | None, typer.Option("--max-ppl-increase", help="The verdict's limit on perplexity.  [default: 5%]")
]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="The verdict's limit on the KL divergence, in nats.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Damp = Annotated[float, typer.Option("--damp", min=0.0, max=1.0, help="Damping, as a share of mean(diag(H)).")]
ActOrder = Annotated[
    bool, typer.Option("--act-order/--no-act-order", help="Take columns in the order of falling diag(H).")
]
For = Annotated[
    Engine | None,
    typer.Option(
        "--for", help="An engine that must load it: else the run is refused before any work, with every reason."
    ),
]
Vram = Annotated[
    str | None, typer.Option("--vram", help="The most GPU memory the run may take.  [default: what is free]")
]
Ram = Annotated[str | None, typer.Option("--ram", help="The most RAM the run may take.  [default: what is free]")]
HiddenStates = Annotated[States, typer.Option("--states", help="Where hidden states live.")]
Correct = Annotated[
    float,
    typer.Option(
        "--correct", min=0.0, max=1.0, help="Share of the inputs' drift from the original's to make up for; 0: none."
    ),
]
DriftSamples = Annotated[
    int | None,
    typer.Option(
        "--drift-samples",
        min=1,
        help="First windows that also run through the original, to learn the drift; --quality best takes all.  "
        "[default: all; on a CPU half, and 32768 tokens at least]",
    ),
]
Refine = Annotated[int, typer.Option("--refine", min=0, max=100, help="Passes over scales and codes after GPTQ.")]
InputsOption = Annotated[
    Inputs,
    typer.Option("--inputs", help="What calibrates a layer: its inputs in the quantized model, or the original."),
]
RoundingOption = Annotated[Rounding, typer.Option("--rounding", help="Error-compensating, or to nearest (awq only).")]
