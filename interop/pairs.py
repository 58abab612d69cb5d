# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints, which clients, and what is known not to work, each with its reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interop.environments import ROOT

RESULTS = Path(__file__).parent / "results.json"
SAMPLES, SEQLEN = 8, 128
# max |difference| / max |logit|. The clients that run in float16 differ by up to 3e-3 from a float32 forward; a wrong
# nibble order, zero point or scale differs by 0.1 and more.
EXACT, HALF = 1e-4, 3e-3
AGREE = 1e-3  # relative, between quantkit's figures of a foreign checkpoint and those of its own tool's forward

DEMO = ROOT / "quantkit" / "demo"
MINI = ROOT.parent / "shared" / "models" / "mini-qwen2-26m"
MODELS = {"demo": DEMO, "mini": MINI}  # tied; untied, where it is


@dataclass(frozen=True)
class Case:
    """A checkpoint that quantkit writes: what it is called, of which model, and the command."""

    name: str
    command: tuple[str, ...]
    recipe: str | None = None
    model: str = "demo"

    @property
    def format(self) -> str:
        return self.command[self.command.index("--format") + 1]

    @property
    def scheme(self) -> str:
        """W4 g128 asym, or mixed."""
        bits, group = (self.command[self.command.index(word) + 1] for word in ("--w-bit", "--group"))
        return "mixed" if self.recipe == MIXED else f"W{bits} g{group} {self.command[-1].removeprefix('--')}"


def _case(method: str, format: str, bits: int, group: int, kind: str, **more: str) -> Case:
    command = (method, "--format", format, "--w-bit", str(bits), "--group", str(group), f"--{kind}")
    model, label = more.get("model", "demo"), more.get("label")
    name = f"{format} W{bits} g{group} {kind}{f', {label}' if label else ''} ({model})"
    return Case(name, command, more.get("recipe"), model)


KEEP = "rules: [{match: 'model.layers.1.mlp.down_proj', keep: 16bit}]\n"
MIXED = "rules: [{layers: '1,3', bits: 8}, {kind: down_proj, group_size: 64}]\n"
CASES = [
    _case("awq", "awq", 4, 128, "asym", label="with folded scales"),
    _case("rtn", "awq", 4, 128, "asym"),
    _case("rtn", "awq", 4, 64, "asym"),
    _case("rtn", "awq", 4, 128, "sym"),
    _case("rtn", "awq", 4, 128, "asym", recipe=KEEP, label="one layer kept"),
    _case("gptq", "gptq", 4, 128, "sym", label="act-order, static groups"),
    _case("rtn", "gptq", 4, 128, "sym"),
    _case("rtn", "gptq", 4, 64, "sym"),
    _case("rtn", "gptq", 8, 128, "sym"),
    _case("rtn", "gptq", 3, 128, "sym"),
    _case("rtn", "gptq", 2, 64, "sym"),
    _case("rtn", "gptq", 4, 128, "asym"),
    _case("rtn", "gptq", 4, 128, "sym", recipe=KEEP, label="one layer kept"),
    _case("rtn", "gptq", 4, 128, "sym", recipe=MIXED, label="mixed"),
    _case("rtn", "gptq_v2", 4, 128, "asym"),
    _case("rtn", "gptq_v2", 4, 64, "asym"),
    _case("rtn", "gptq_v2", 3, 128, "asym"),
    _case("rtn", "gptq_v2", 8, 128, "asym"),
    _case("rtn", "compressed-tensors", 4, 128, "sym"),
    _case("rtn", "compressed-tensors", 4, 64, "sym"),
    _case("rtn", "compressed-tensors", 8, 128, "sym"),
    _case("rtn", "compressed-tensors", 3, 128, "sym"),
    _case("rtn", "compressed-tensors", 4, 128, "asym"),
    _case("rtn", "compressed-tensors", 4, 64, "asym"),
    _case("rtn", "compressed-tensors", 8, 128, "asym"),
    _case("rtn", "compressed-tensors", 4, 128, "sym", recipe=MIXED, label="mixed"),
    _case("rtn", "compressed-tensors", 4, 128, "sym", recipe=KEEP, label="one layer kept"),
    _case("rtn", "awq", 4, 128, "asym", model="mini"),
    _case("rtn", "gptq", 4, 128, "sym", model="mini"),
    _case("rtn", "gptq_v2", 4, 128, "asym", model="mini"),
    _case("rtn", "compressed-tensors", 4, 128, "sym", model="mini"),
    _case("rtn", "compressed-tensors", 4, 128, "asym", model="mini"),
]


@dataclass(frozen=True)
class Client:
    """A program that loads checkpoints: its environment, script, and the formats that it claims."""

    name: str
    environment: str
    script: str
    formats: tuple[str, ...]


READERS = [
    Client("vLLM (CPU)", "vllm", "read_vllm.py", ("awq", "gptq", "gptq_v2", "compressed-tensors")),
    Client("transformers + gptqmodel", "gptqmodel", "read_transformers.py", ("awq", "gptq", "gptq_v2")),
    Client("GPTQModel", "gptqmodel", "read_gptqmodel.py", ("awq", "gptq", "gptq_v2")),
    Client("transformers + compressed-tensors", "transformers", "read_transformers.py", ("compressed-tensors",)),
    Client("transformers, dequantize=True", "transformers", "read_dequantized.py", ("compressed-tensors",)),
    Client("transformers 5.22.2", "transformers-5.22", "read_transformers.py", ("compressed-tensors",)),
    Client("compressed-tensors 0.17", "compressed-tensors-0.17", "read_transformers.py", ("compressed-tensors",)),
    Client("AutoAWQ", "autoawq", "read_autoawq.py", ("awq",)),
    Client("AutoGPTQ", "autogptq", "read_autogptq.py", ("gptq", "gptq_v2")),
]


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that another tool writes, and the client whose forward it is measured with."""

    name: str
    environment: str
    script: str
    format: str
    reader: str
    model: str = "demo"


WRITERS = [
    Foreign(f"{tool} {format} ({model})", tool.lower(), f"write_{tool.lower()}.py", format, reader, model)
    for model in MODELS
    for tool, format, reader in (
        ("GPTQModel", "gptq sym", "GPTQModel"),
        ("GPTQModel", "gptq sym act-order", "GPTQModel"),
        ("GPTQModel", "gptq_v2 asym", "GPTQModel"),
        ("GPTQModel", "awq asym", "GPTQModel"),
        ("AutoAWQ", "awq asym", "AutoAWQ"),
        ("AutoGPTQ", "gptq asym act-order", "AutoGPTQ"),
    )
]


# ---------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Known:
    """A pair that is not ok: the client, a pattern of the checkpoint's name, and the cause, found by experiment."""

    client: str
    checkpoint: str
    reason: str

    def is_about(self, pair: str) -> bool:
        return re.search(self.checkpoint, pair.partition(" < ")[0]) is not None and pair.endswith(f"< {self.client}")


KNOWN = [
    Known("vLLM (CPU)", r"W8 g128 sym|mixed", "its kernels for CPUs are of 4 bits; those for GPUs take 8 bits, too"),
    Known("vLLM (CPU)", r"^gptq.* asym", "takes symmetric GPTQ only"),
    Known(
        "compressed-tensors 0.17",
        r"W3",
        "its 3-bit words hold 10 codes, those of 0.20 are dense (5, 6 and 7 bits alike)",
    ),
    Known(
        "transformers + gptqmodel",
        r"^gptq W2",
        "runs in float16, which at 2 bits is 4.2e-3 from float32 with our weights, too",
    ),
    Known("transformers + gptqmodel", r"^gptq .*mixed", "does not read `dynamic`"),
    Known("GPTQModel", r"^gptq W4 g128 asym", "trusts asymmetric v1 files of its own only; gptq_v2 loads"),
    Known(
        "transformers + compressed-tensors",
        r"asym",
        "5.23.0 expects weight_zero_point unpacked; 5.22.2 loads it, and 5.23.0 with dequantize=True",
    ),
    Known(
        "transformers, dequantize=True", r"mixed", "5.23.0 applies the first scheme to all layers; without it they load"
    ),
    Known(
        "AutoAWQ",
        r"one layer kept",
        "looks for the listed names in names within a layer, so it skips in all layers or none",
    ),
    Known(
        "AutoGPTQ",
        r"\(demo\)",
        "needs lm_head.weight beside a tied embedding; with it added to the file the error is 0",
    ),
    Known("AutoGPTQ", r"gptq_v2", "0.7.1 reads every file as v1"),
]


def outcome(pair: str, result: Mapping[str, Any] | None) -> str:
    """One of "ok", "ok (fp16)", "wrong", "says" and "not run"."""
    if result is None:
        return "not run"
    if "said" in result:
        return "says"
    if "apart" in result:
        return "ok" if max(result["apart"].values()) <= AGREE else "wrong"
    error = result["error"]
    return "ok" if error <= EXACT else "ok (fp16)" if error <= HALF else "wrong"


def reason(pair: str) -> str | None:
    """Why a pair is known not to be ok."""
    return next((known.reason for known in KNOWN if known.is_about(pair)), None)
