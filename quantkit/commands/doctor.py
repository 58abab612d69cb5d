# SPDX-License-Identifier: Apache-2.0
"""`quantkit doctor`: what is installed here and what it could run; of a folder also whether it fits, and what helps."""

import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from quantkit import __version__
from quantkit.commands.serve import ServeRequest, folder_fit, gguf_of
from quantkit.errors import ModelError
from quantkit.hardware.card import DRIVER, visible_card
from quantkit.quantized import open_quantized, quantization_of, read_config
from quantkit.records import Fit, Part
from quantkit.results.document import RESULT, read_result
from quantkit.serving.engines import kernels
from quantkit.text import one_line

PACKAGES = (
    *("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"),
    *("vllm", "sglang", "llama-cpp-python", "gptqmodel", "compressed-tensors", "optimum", "accelerate"),
)
PROGRAMS = ("vllm", "llama-server", "nginx", "ollama")
WITH_KERNELS = ("vllm", "sglang")


class Machine(Part):
    """What is here. Sizes in bytes; card: name, memory_bytes, free_bytes, capability; None: no GPU is seen."""

    python: str
    system: str
    cpus: int
    ram_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    driver: str | None
    card: dict[str, Any] | None
    packages: dict[str, str | None]
    programs: dict[str, str | None]


class Trouble(Part):
    """A usual trouble, and the command that answers it."""

    symptom: str
    command: str
    why: str


class Diagnosis(Part):
    """The whole of it.

    fit, kernels: of a folder; the latter are engine -> kind of linear -> kernel; problems: what keeps it from running
    """

    quantkit: str
    machine: Machine
    folder: str | None = None
    fit: Fit | None = None
    kernels: dict[str, dict[str, str]] | None = None
    problems: list[str]
    troubles: list[Trouble]


def diagnose(folder: Path | None) -> Diagnosis:
    """Look at this machine, and at a folder.

    Raises:
        ModelError: there is no such folder, or it is damaged.
    """
    machine = _machine()
    if folder is None:
        return Diagnosis(
            quantkit=__version__, machine=machine, problems=_lacks(machine), troubles=_troubles("OUT", None)
        )
    fit, found = _look(folder)
    problems = [*_lacks(machine), *_does_not_run(machine, fit)]
    return Diagnosis(
        quantkit=__version__,
        machine=machine,
        folder=str(folder),
        fit=fit,
        kernels=found,
        problems=problems,
        troubles=_troubles(str(folder), fit),
    )


def _machine() -> Machine:
    memory = psutil.virtual_memory()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(".").free,
        driver=_driver(),
        card=_card(),
        packages={name: _version(name) for name in PACKAGES},
        programs={name: shutil.which(name) for name in PROGRAMS},
    )


def _driver() -> str | None:
    path = DRIVER[0]
    return one_line(path.read_text(encoding="utf-8", errors="replace").splitlines()[0]) if path.is_file() else None


def _card() -> dict[str, Any] | None:
    card = visible_card()
    if card is None:
        return None
    import torch

    free, _ = torch.cuda.mem_get_info()
    capability = ".".join(map(str, card.capability))
    return {"name": card.name, "memory_bytes": card.memory_bytes, "free_bytes": free, "capability": capability}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _look(folder: Path) -> tuple[Fit | None, dict[str, dict[str, str]]]:
    """What `fit` says of a folder, and the kernels that its linears would get."""
    if gguf_of(folder) is not None:
        recorded = read_result(folder) if (folder / RESULT).is_file() else None
        measured = recorded.verification if recorded else None
        return measured.fit if measured else None, {}
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a folder with a checkpoint, or a .gguf file")
    fit = folder_fit(ServeRequest(folder))
    if not quantization_of(read_config(folder)):
        return fit, {}
    opened = open_quantized(folder)
    return fit, {engine: kernels(engine, opened.format_name, opened.decoder) for engine in WITH_KERNELS}


def _lacks(machine: Machine) -> list[str]:
    """What keeps this machine from serving at all."""
    problems = []
    if machine.driver and machine.card is None:
        problems.append("there is an NVIDIA driver, but torch sees no GPU; install a torch with CUDA")
    engines = [machine.packages["vllm"], machine.packages["sglang"], machine.packages["llama-cpp-python"]]
    if not any((*engines, machine.programs["vllm"], machine.programs["llama-server"])):
        problems.append(
            "no engine is installed here; pip install 'quantkit[serve]', or give --engine-python PATH to serve"
        )
    return problems


def _does_not_run(machine: Machine, fit: Fit | None) -> list[str]:
    """What keeps a folder from running here."""
    if fit is None:
        return []
    problems = []
    if not fit.fits:
        problems.append(
            f"it does not fit: {fit.longest_context:,} tokens of context do, {fit.context:,} were asked for"
        )
    if machine.card and fit.budget_bytes > machine.card["memory_bytes"]:
        problems.append(f"the budget of {fit.budget_bytes:,} bytes is more than {machine.card['name']} has")
    reasons = [reason for engine in WITH_KERNELS if (reason := fit.engines.get(engine))]
    if len(reasons) == len(WITH_KERNELS) and fit.engines.get("llama.cpp"):
        problems += reasons
    return problems


def _troubles(out: str, fit: Fit | None) -> list[Trouble]:
    """The usual ones, with the folder's own name."""
    longest = fit.longest_context if fit and fit.longest_context else None
    rows: Sequence[tuple[str, list[str], str]] = (
        (
            "out of memory, or no room for the KV cache",
            ["quantkit", "serve", out, *(["--context", str(longest)] if longest else ["--kv", "fp8"])],
            "starts the engine with the flags of fit; --kv fp8 halves the cache",
        ),
        (
            "answers got worse",
            ["quantkit", "verify", out],
            "measures its files again, against the original",
        ),
        (
            "worse than you can accept",
            ["quantkit", "awq", "MODEL", "--quality", "best"],
            "tunes each layer; or --group 64, or more bits",
        ),
        (
            "a slow first token",
            ["quantkit", "serve", out, "--", "--max-num-batched-tokens", "8192"],
            "larger batches of the prompt, for more memory",
        ),
        ("an engine does not load it", ["quantkit", "fit", out], "says why, for each engine, and what would load"),
        ("the engine or the model", ["quantkit", "chat", out, "--prompt", "TEXT"], "answers without an engine"),
    )
    return [Trouble(symptom=symptom, command=shlex.join(words), why=why) for symptom, words, why in rows]
