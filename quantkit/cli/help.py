# SPDX-License-Identifier: Apache-2.0
"""What `--help` shows: options in groups, only those that a method has, and examples."""

from typing import Any

from typer.core import TyperCommand

from quantkit.methods.table import METHODS

GROUPS = {  # heading -> parameters; those that stand nowhere come last
    "What it becomes": "w_bit group sym scheme format type outside recipe quality menu also out",
    "Calibration": "calib samples seqlen seed field probe_samples",
    "Evaluation and verdict": "against eval eval_samples no_verify max_ppl_increase max_kl",
    "Where it is served": "budget context kv engine tensor_parallel weights_only",
    "This machine": "device vram ram states offline fresh",
    "Of the method": "method act_order damp correct drift_samples refine rounding inputs",
}
CALIBRATED = [
    "quality",
    "calib",
    "samples",
    "seed",
    "act_order",
    "damp",
    "correct",
    "drift_samples",
    "refine",
    "inputs",
]

WORDS = """\b
MODEL   a recipe (`quantkit models` lists them), a folder, or a hub id: org/name
OUT     a folder that a command has made, or another tool's checkpoint
SOURCE  of text: mix, general, reasoning, code, chinese; a .txt, .jsonl, .json, .csv
        or .parquet file; hf:DATASET[/CONFIG][:SPLIT]; token ids in .safetensors
SIZE    22GiB, 24GB, 500MiB; tokens: 8192, 16k, 1M

\b
quantkit fit deepseek-r1-32b --context 16k      what fits a card, before any work
quantkit gptq demo                              quantize and measure
quantkit verify OUT                             measure what is in a folder
quantkit --install-completion                   words complete with the tab key
"""

EXAMPLES = {
    "awq": ("awq demo", "awq ORG/NAME --budget 24GB --context 16k --out OUT"),
    "gptq": ("gptq demo --w-bit 3 --group 64", "gptq ORG/NAME --quality best", "gptq ORG/NAME --type q4_k"),
    "rtn": ("rtn demo --w-bit 8", "rtn ORG/NAME --format gguf --type q8_0"),
    "fit": ("fit deepseek-r1-32b --context 32k", "fit ORG/NAME --type q4_k --budget 24GB", "fit OUT"),
    "verify": ("verify OUT", "verify OUT --against ORG/NAME --eval wiki.txt"),
    "sweep": ("sweep demo --method awq,gptq --w-bit 3,4 --group 64,128",),
    "allocate": ("allocate deepseek-r1-32b --budget 22GiB --context 16k --run",),
    "convert": ("convert OUT --to gptq", "convert ORG/NAME --to gguf --type q4_k"),
    "inspect": ("inspect OUT",),
    "push": ("push OUT ORG/NAME --dry-run",),
    "models": ("models",),
}


def epilog(command: str) -> str | None:
    """The examples of a command."""
    lines = [f"quantkit {words}" for words in EXAMPLES.get(command, ())]
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)]) if lines else None


def concerns(command: str, parameter: str) -> bool:
    """Whether a command has a use for one of its options; the options of all methods are the same."""
    method = METHODS.get(command)
    if method is None:
        return True
    if parameter == "rounding":
        return method.calibrates and method.nearest
    return method.calibrates or parameter not in CALIBRATED


class Command(TyperCommand):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """As typer's, by group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{heading: [] for heading in GROUPS}, "Other": []}
        for param in self.get_params(ctx):
            name = param.name or ""
            record = param.get_help_record(ctx)
            if record is None or not concerns(self.name or "", name):
                continue
            heading = next((heading for heading, names in GROUPS.items() if name in names.split()), "Other")
            groups["Arguments" if param.param_type_name == "argument" else heading].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
