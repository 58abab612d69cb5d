# SPDX-License-Identifier: Apache-2.0
"""Ours against other tools on a CPU: the same model, token ids and threads, one after the other in one run.

    python benchmarks/cpu.py MODEL IDS.safetensors --samples 128 --threads 2 \\
        --python llmcompressor=ENV/bin/python --python autoawq=ENV/bin/python

Each tool runs in its own process and environment. What is timed is quantizing and saving: not imports, nor loading the
model, nor verification. Tools whose environment is not named are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = {
    "quantkit gptq": "quantkit",
    "quantkit awq": "quantkit",
    "quantkit gptq --drift-samples 128": "quantkit",
    "quantkit gptq --inputs original": "quantkit",
    "quantkit gptq --correct 0 --refine 0": "quantkit",
    "llm-compressor gptq": "llmcompressor",
    "llm-compressor awq": "llmcompressor",
    "GPTQModel gptq": "gptqmodel",
    "AutoAWQ awq": "autoawq",
}


def by_quantkit(method: str, model: Path, ids: Path, samples: int, out: Path, *said: str) -> Callable[[], None]:
    """Our pipeline without verification; said: options of the command as pairs.

    `--correct 0 --refine 0` is GPTQ as others have it: no second stream, nothing gone over again.
    """
    import torch
    from rich.console import Console
    from safetensors.torch import load_file

    from quantkit.calibration.tokens import TokenSet
    from quantkit.formats import FORMATS
    from quantkit.methods.table import Options
    from quantkit.model.streaming import open_model
    from quantkit.pipeline.job import Job
    from quantkit.pipeline.memory import laid_out, lay_out_job
    from quantkit.pipeline.run import run
    from quantkit.pipeline.runtime import Runtime
    from quantkit.plan import make_plan
    from quantkit.recipe import Recipe, resolver
    from quantkit.report.terminal.progress import display
    from quantkit.settings.defaults import AskedScheme, choose_scheme

    values = dict(zip(said[::2], said[1::2], strict=True))
    options = Options(
        correct=float(values.get("--correct", Options.correct)),
        refine=int(values.get("--refine", Options.refine)),
        drift_samples=int(values["--drift-samples"]) if "--drift-samples" in values else None,
    )
    opened = open_model(model)
    scheme = choose_scheme(method, Recipe(), AskedScheme(4, 128))
    plan = make_plan(opened, resolver(Recipe(), scheme), FORMATS[method])
    tokens = TokenSet(load_file(ids)["input_ids"][:samples], "ids", "ids", "ids")
    inputs = values.get("--inputs", "quantized")
    job = Job(Runtime(opened, torch.device("cpu"), out), plan, method, options, tokens, inputs=inputs)

    def work() -> None:
        with display(Console(stderr=True), job.runtime.device) as progress:
            run(laid_out(job, lay_out_job(job, [])), progress)

    return work


def by_llmcompressor(method: str, model: Path, ids: Path, samples: int, out: Path) -> Callable[[], None]:
    """llm-compressor's oneshot: GPTQ symmetric, AWQ asymmetric, groups of 128.

    Its AWQ pins memory, which torch refuses where there is no accelerator: there pinning does nothing.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *args: tensor  # type: ignore[method-assign]
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=method == "gptq", strategy="group", group_size=128)
    scheme: dict[str, Any] = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    scheme |= {"ignore": ["lm_head"]}
    recipe = [GPTQModifier(**scheme) if method == "gptq" else AWQModifier(**scheme)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = load_file(ids)["input_ids"][:samples]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    data = Dataset.from_list(rows)

    def work() -> None:
        oneshot(
            model=loaded,
            dataset=data,
            recipe=recipe,
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
        )
        loaded.save_pretrained(out, save_compressed=True)

    return work


def by_gptqmodel(method: str, model: Path, ids: Path, samples: int, out: Path) -> Callable[[], None]:
    """GPTQModel's GPTQ, symmetric, groups of 128."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, offload_to_disk=False, device="cpu")
    loaded = GPTQModel.load(str(model), config, dtype=torch.float32)
    tokens = load_file(ids)["input_ids"][:samples]
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]

    def work() -> None:
        loaded.quantize(data, batch_size=1, backend=BACKEND.AUTO, calibration_data_min_length=1)
        loaded.save(str(out))

    return work


def by_autoawq(method: str, model: Path, ids: Path, samples: int, out: Path) -> Callable[[], None]:
    """AutoAWQ: zero points, groups of 128. It takes text, so it is given what the ids decode to."""
    import torch
    from awq import AutoAWQForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoAWQForCausalLM.from_pretrained(str(model), device_map={"": "cpu"}, torch_dtype=torch.float32)
    tokens = load_file(ids)["input_ids"][:samples]
    text = [tokenizer.decode(row) for row in tokens]
    config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}

    def work() -> None:
        loaded.quantize(
            tokenizer,
            quant_config=config,
            calib_data=text,
            max_calib_samples=len(tokens),
            max_calib_seq_len=tokens.shape[1],
        )
        loaded.save_quantized(str(out))

    return work


def time_here(tool: str, model: Path, ids: Path, samples: int) -> dict[str, float]:
    """Run one tool in this process."""
    prepare: Callable[..., Callable[[], None]] = {
        "quantkit": by_quantkit,
        "llmcompressor": by_llmcompressor,
        "gptqmodel": by_gptqmodel,
        "autoawq": by_autoawq,
    }[TOOLS[tool]]
    with tempfile.TemporaryDirectory() as scratch:
        _, method, *said = tool.split()
        work = prepare(method, model, ids, samples, Path(scratch) / "out", *said)
        began, used = time.perf_counter(), time.process_time()
        work()
        return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}


def main() -> None:
    """Run every tool that an environment is named for; print one JSON document with the ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--tool", choices=TOOLS, help="run only this one, here")
    said = parser.parse_args()
    if said.tool:
        print(json.dumps(time_here(said.tool, said.model, said.ids, said.samples)))
        return
    pythons = {"quantkit": sys.executable} | dict(pair.split("=", 1) for pair in said.python)
    threads = {name: str(said.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    threads["GPTQMODEL_CPU_WORKERS"] = "2"  # it asks for two and on two cores has one
    found: dict[str, dict[str, float]] = {}
    for tool in (tool for tool in TOOLS if TOOLS[tool] in pythons):
        words = [pythons[TOOLS[tool]], __file__, str(said.model), str(said.ids), "--tool", tool]
        words += ["--samples", str(said.samples)]
        done = subprocess.run(words, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            found[tool] = json.loads(done.stdout.splitlines()[-1])
        print(tool, found.get(tool, "failed"), file=sys.stderr, flush=True)
    ratios = {
        tool: figures["seconds"] / found[ours]["seconds"]
        for tool, figures in found.items()
        if (ours := f"quantkit {tool.split()[1]}") in found and ours != tool
    }
    print(json.dumps({"samples": said.samples, "threads": said.threads, "tools": found, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
