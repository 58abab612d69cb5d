# SPDX-License-Identifier: Apache-2.0
"""The options of the commands: each said once, with its help. What there is to choose from, the registries say."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.formats import FORMATS
from quantkit.formats.gguf import INTEGER_TYPES, K_TYPES, OUTSIDE_TYPES
from quantkit.methods.table import METHODS
from quantkit.scheme import MAX_BITS, MIN_BITS, NAMED
from quantkit.serving.versions import VERSIONS

SPELLINGS = {"llamacpp": "llama.cpp"}  # as names are typed, too


def choice(names: Collection[str]) -> dict[str, Any]:
    """What an option needs to take one of these names."""

    def parse(text: str) -> str:
        name = SPELLINGS.get(text, text)
        if name not in names:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, names))}.")
        return name

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return {"parser": parse, "autocompletion": complete, "metavar": f"[{'|'.join(names)}]"}


def group_size(text: str) -> int | None:
    """Columns of a group; None: what divides."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number, nor auto.") from None


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A recipe name (deepseek-r1-32b, demo), a folder, or a hub id (org/name)."),
]
WBit = Annotated[
    int | None, typer.Option("--w-bit", min=MIN_BITS, max=MAX_BITS, help="Bits of a weight.  [default: 4]")
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        help="Columns that share a scale; -1: whole rows; auto: 128, or the largest that divides.  [default: auto]",
        parser=group_size,
        metavar="N|auto",
    ),
]
Sym = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Fixed zero point or one per group.  [default: by method]")
]
SchemeOption = Annotated[
    str | None,
    typer.Option("--scheme", "--type", metavar="NAME", help=f"A scheme by name: {', '.join(NAMED)}."),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="How it is stored.  [default: by method and bits]", **choice(FORMATS))
]
Target = Annotated[
    str, typer.Option("--to", help="The format of the result; fp16: not quantized.", **choice((*FORMATS, "fp16")))
]
BlockOption = Annotated[
    str | None,
    typer.Option(
        "--type",
        help="gguf: of the linears.  [default: as the integers are; MODEL: q4_k]",
        **choice(INTEGER_TYPES + K_TYPES),
    ),
]
OutsideOption = Annotated[
    str, typer.Option("--embeddings", help="gguf: type of the embedding and the head.", **choice(OUTSIDE_TYPES))
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe file: bits and groups by layer and kind.")
]
Quality = Annotated[
    str,
    typer.Option(
        "--quality",
        help="fast: what Gram matrices give; best: each layer tuned by gradients.",
        **choice(("fast", "best")),
    ),
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
Kv = Annotated[
    str | None, typer.Option("--kv", help="Type of the KV cache.  [default: fp16]", **choice(("fp16", "fp8")))
]
RecordedKv = Annotated[
    str | None, typer.Option("--kv", help="Type of the KV cache.  [default: as recorded]", **choice(("fp16", "fp8")))
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder.  [default: outputs/...]")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing.")]
Offline = Annotated[bool, typer.Option("--offline", help="Touch no network.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Leave out the comparison with FP16.")]
MaxPpl = Annotated[
    str | None, typer.Option("--max-ppl-increase", help="The verdict's limit on perplexity.  [default: 5%]")
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", help="The verdict's limit on the KL divergence, in nats.  [default: 0.2, or by that on perplexity]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Damp = Annotated[float, typer.Option("--damp", min=0.0, max=1.0, help="Damping, as a share of mean(diag(H)).")]
ActOrder = Annotated[
    bool, typer.Option("--act-order/--no-act-order", help="Take columns in the order of falling diag(H).")
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="An engine that must load it: else the run is refused before any work, with every reason.",
        **choice(VERSIONS),
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        "--for",
        "--engine",
        help="The engine whose kernels must run it.  [default: vllm]",
        **choice((*VERSIONS, "any")),
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--engine", help="The engine.  [default: the first that loads it]", **choice(("vllm", "sglang", "llama.cpp"))
    ),
]
ChatEngine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What runs it.  [default: transformers; llama.cpp for .gguf]",
        **choice(("transformers", "vllm", "sglang", "llama.cpp")),
    ),
]
Calibrated = Annotated[
    str,
    typer.Option(
        "--method",
        help="How integers are chosen.",
        **choice([row.name for row in METHODS.values() if row.calibrates]),
    ),
]
Vram = Annotated[
    str | None, typer.Option("--vram", help="The most GPU memory the run may take.  [default: what is free]")
]
Ram = Annotated[str | None, typer.Option("--ram", help="The most RAM the run may take.  [default: what is free]")]
States = Annotated[
    str, typer.Option("--states", help="Where hidden states live.", **choice(("auto", "device", "ram", "file")))
]
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
Inputs = Annotated[
    str,
    typer.Option(
        "--inputs",
        help="What calibrates a layer: its inputs in the quantized model, or the original.",
        **choice(("quantized", "original")),
    ),
]
Rounding = Annotated[
    str, typer.Option("--rounding", help="Error-compensating, or to nearest.", **choice(("gptq", "nearest")))
]
