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
# max |difference| / max |logit|. The clients that run in float16 differ by up to 5.2e-3 from a float32 forward, and
# transformers itself in float16 by 3e-3 with our weights; a wrong nibble order, zero point or scale by 0.1 or more.
EXACT, HALF = 1e-4, 1e-2
AGREE = 1e-3  # relative, between quantkit's figures of a foreign checkpoint and those of its own tool's forward

DEMO = ROOT / "quantkit" / "demo"
MINI = ROOT.parent / "shared" / "models" / "mini-qwen2-26m"
MODELS = {"demo": DEMO, "mini": MINI}  # tied; untied, where it is


@dataclass(frozen=True)
class Case:
    """A checkpoint that quantkit writes: of which model, in which format and scheme, by which method and recipe.

    label: what is special about it
    """

    method: str
    format: str
    bits: int
    group_size: int
    kind: str  # sym or asym
    recipe: str | None = None
    label: str | None = None
    model: str = "demo"

    @property
    def name(self) -> str:
        label = f", {self.label}" if self.label else ""
        return f"{self.format} W{self.bits} g{self.group_size} {self.kind}{label} ({self.model})"

    @property
    def scheme(self) -> str:
        """W4 g128 asym, or mixed."""
        if self.recipe in (MIXED, GROUPS):
            return "mixed" if self.recipe == MIXED else "mixed groups"
        head = f", {self.label}" if self.recipe in HEADS else ""
        return f"W{self.bits} g{self.group_size} {self.kind}{head}"


KEEP = "rules: [{match: 'model.layers.1.mlp.down_proj', keep: 16bit}]\n"
MIXED = "rules: [{layers: '1,3', bits: 8}, {kind: down_proj, group_size: 64}]\n"
GROUPS = "rules: [{layers: '1,3', group_size: 32}, {kind: down_proj, group_size: 64}]\n"
HEADS = ("rules: [{kind: lm_head, bits: 4}]\n", "rules: [{kind: lm_head, bits: 8}]\n")
CASES = [
    Case("awq", "awq", 4, 128, "asym", label="with folded scales"),
    Case("rtn", "awq", 4, 128, "asym"),
    Case("rtn", "awq", 4, 64, "asym"),
    Case("rtn", "awq", 4, 128, "sym"),
    Case("rtn", "awq", 4, 64, "sym"),
    Case("rtn", "awq", 4, 128, "asym", recipe=KEEP, label="one layer kept"),
    Case("gptq", "gptq", 4, 128, "sym", label="act-order, static groups"),
    Case("rtn", "gptq", 4, 128, "sym"),
    Case("rtn", "gptq", 4, 64, "sym"),
    Case("rtn", "gptq", 8, 128, "sym"),
    Case("rtn", "gptq", 3, 128, "sym"),
    Case("rtn", "gptq", 2, 64, "sym"),
    Case("rtn", "gptq", 4, 128, "asym"),
    Case("rtn", "gptq", 4, 128, "sym", recipe=KEEP, label="one layer kept"),
    Case("rtn", "gptq", 4, 128, "sym", recipe=MIXED, label="mixed"),
    Case("rtn", "gptq_v2", 4, 128, "asym"),
    Case("rtn", "gptq_v2", 4, 64, "asym"),
    Case("rtn", "gptq_v2", 3, 128, "asym"),
    Case("rtn", "gptq_v2", 8, 128, "asym"),
    Case("rtn", "compressed-tensors", 4, 128, "sym"),
    Case("rtn", "compressed-tensors", 4, 64, "sym"),
    Case("rtn", "compressed-tensors", 8, 128, "sym"),
    Case("rtn", "compressed-tensors", 3, 128, "sym"),
    Case("rtn", "compressed-tensors", 4, 128, "asym"),
    Case("rtn", "compressed-tensors", 4, 64, "asym"),
    Case("rtn", "compressed-tensors", 8, 128, "asym"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=MIXED, label="mixed"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=GROUPS, label="mixed groups"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=KEEP, label="one layer kept"),
    Case("rtn", "gguf", 4, 32, "sym"),
    Case("rtn", "gguf", 4, 32, "asym"),
    Case("rtn", "gguf", 8, 32, "sym"),
    Case("rtn", "awq", 4, 128, "asym", model="mini"),
    Case("rtn", "gptq", 4, 128, "sym", model="mini"),
    Case("rtn", "gptq", 4, 64, "sym", model="mini"),
    Case("rtn", "gptq", 8, 128, "sym", model="mini"),
    Case("rtn", "gptq_v2", 4, 128, "asym", model="mini"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", model="mini"),
    Case("rtn", "compressed-tensors", 4, 128, "asym", model="mini"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=MIXED, label="mixed", model="mini"),
    Case("rtn", "gguf", 4, 32, "asym", model="mini"),
    Case("rtn", "gguf", 8, 32, "sym", model="mini"),
    Case("rtn", "gptq", 4, 128, "sym", recipe=HEADS[0], label="lm_head in 4 bits", model="mini"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=HEADS[0], label="lm_head in 4 bits", model="mini"),
    Case("rtn", "compressed-tensors", 4, 128, "sym", recipe=HEADS[1], label="lm_head in 8 bits", model="mini"),
    Case("rtn", "gguf", 4, 32, "sym", recipe=HEADS[0], label="lm_head in 4 bits", model="mini"),
    Case("rtn", "gguf", 4, 32, "sym", recipe=HEADS[1], label="lm_head in 8 bits", model="mini"),
]


@dataclass(frozen=True)
class Client:
    """A program that loads checkpoints: its environment, script, the formats it claims, the models it is asked of."""

    name: str
    environment: str
    script: str
    formats: tuple[str, ...]
    models: tuple[str, ...] = tuple(MODELS)

    def reads(self, case: Case) -> bool:
        """Whether it is asked about a case."""
        return case.format in self.formats and case.model in self.models


READERS = [
    Client("vLLM (CPU)", "vllm", "read_vllm.py", ("awq", "gptq", "gptq_v2", "compressed-tensors")),
    Client("transformers + gptqmodel", "gptqmodel", "read_transformers.py", ("awq", "gptq", "gptq_v2")),
    Client("GPTQModel", "gptqmodel", "read_gptqmodel.py", ("awq", "gptq", "gptq_v2")),
    Client("transformers + compressed-tensors", "transformers", "read_transformers.py", ("compressed-tensors",)),
    Client("transformers, dequantize=True", "transformers", "read_dequantized.py", ("compressed-tensors",)),
    Client("transformers 5.22.2", "transformers-5.22", "read_transformers.py", ("compressed-tensors",)),
    Client("compressed-tensors 0.17", "compressed-tensors-0.17", "read_transformers.py", ("compressed-tensors",)),
    Client("AutoAWQ", "autoawq", "read_autoawq.py", ("awq",)),
    # beside a tied embedding it needs lm_head.weight; with that added to the demo's files the error is 0
    Client("AutoGPTQ", "autogptq", "read_autogptq.py", ("gptq", "gptq_v2"), models=("mini",)),
    Client("transformers + gguf", "transformers", "read_gguf.py", ("gguf",)),
    Client("llama.cpp", "llamacpp", "read_llamacpp.py", ("gguf",)),
    Client("llama.cpp's converter", "llamacpp", "read_converted.py", ("gptq", "gptq_v2", "compressed-tensors")),
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
    Foreign(
        f"{tool} {format} ({model})", environment, f"write_{tool.lower().replace('-', '')}.py", format, reader, model
    )
    for model in MODELS
    for tool, environment, format, reader in (
        ("GPTQModel", "gptqmodel", "gptq sym", "GPTQModel"),
        ("GPTQModel", "gptqmodel", "gptq sym act-order", "GPTQModel"),
        ("GPTQModel", "gptqmodel", "gptq_v2 asym", "GPTQModel"),
        ("GPTQModel", "gptqmodel", "awq asym", "GPTQModel"),
        ("AutoAWQ", "autoawq", "awq asym", "AutoAWQ"),
        ("AutoGPTQ", "autogptq", "gptq asym act-order", "AutoGPTQ"),
        ("llm-compressor", "llmcompressor", "gptq sym", "transformers + compressed-tensors"),
        ("llm-compressor", "llmcompressor", "awq asym", "transformers 5.22.2"),
    )
] + [
    Foreign("AutoRound 4 sym (demo)", "llmcompressor", "write_autoround.py", "4 sym", "GPTQModel"),
    Foreign("AutoRound 4 asym (demo)", "llmcompressor", "write_autoround.py", "4 asym", "transformers + gptqmodel"),
]


# ---------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Known:
    """A pair that is not ok: the client ("verify" for files of others), a pattern of the checkpoint; the cause."""

    client: str
    checkpoint: str
    reason: str

    def is_about(self, pair: str) -> bool:
        checkpoint, client = re.split(" [<>] ", pair, maxsplit=1)
        return client == self.client and re.search(self.checkpoint, checkpoint) is not None


CPU_KERNELS = "its kernels for CPUs are of 4 bits; those for GPUs take 2 to 8 (gptq: 4 and 8, symmetric)"
KNOWN = [
    Known("vLLM (CPU)", r"^gptq W8 .* sym|^gptq .*mixed", CPU_KERNELS),
    Known("vLLM (CPU)", r"^compressed-tensors (W[38]|.*mixed \(|.*lm_head in 8)", CPU_KERNELS),
    Known("vLLM (CPU)", r"^gptq W[23] ", "takes 4 and 8 bits of gptq only"),
    Known("vLLM (CPU)", r"^gptq.* asym", "takes symmetric GPTQ only"),
    Known(
        "compressed-tensors 0.17",
        r"W3",
        "its 3-bit words hold 10 codes, those of 0.20 are dense (5, 6 and 7 bits alike)",
    ),
    Known("transformers + gptqmodel", r"^gptq .*mixed", "does not read `dynamic`"),
    Known("transformers + gptqmodel", r"^gptq .*lm_head", "does not read a quantized lm_head, and does not say so"),
    Known("GPTQModel", r"^gptq W4 g128 asym", "trusts asymmetric v1 files of its own only; gptq_v2 loads"),
    Known(
        "transformers + compressed-tensors",
        r"asym",
        "5.23.0 expects weight_zero_point unpacked; 5.22.2 loads it, and 5.23.0 with dequantize=True",
    ),
    Known(
        "transformers, dequantize=True",
        r"mixed|lm_head in 8",
        "5.23.0 applies the first scheme to all layers; without it they load",
    ),
    Known(
        "AutoAWQ",
        r"one layer kept",
        "looks for the listed names in names within a layer, so it skips in all layers or none",
    ),
    Known("AutoGPTQ", r"gptq_v2", "0.7.1 reads every file as v1"),
    Known("AutoGPTQ", r"^gptq .*lm_head", "does not read a quantized lm_head, and does not say so"),
    Known(
        "verify",
        r"^AutoAWQ .*mini",
        "its transformers 4.51.3 does not read rope_parameters: it runs with another rope_theta, and writes both",
    ),
    Known("llama.cpp's converter", r"^gptq(_v2)? W3", "does not read 3 bits of gptq"),
    Known("llama.cpp's converter", r"^gptq .*mixed", "does not read `dynamic`"),
    Known("llama.cpp's converter", r"^compressed-tensors W3", "reads the words of compressed-tensors 0.17 at 3 bits"),
    Known("llama.cpp's converter", r"^compressed-tensors .*(mixed|lm_head in 8)", "takes one scheme only"),
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


def runs_here(pair: str, result: Mapping[str, Any]) -> bool:
    """Whether what a client said is about the checkpoint, and not about this machine."""
    return not result.get("not_runnable") and reason(pair) != CPU_KERNELS
