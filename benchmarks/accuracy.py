# SPDX-License-Identifier: Apache-2.0
"""KL per bit: quantkit and other tools on the same model, calibration ids and evaluation ids, judged by one evaluator.

    python benchmarks/accuracy.py MODEL CALIB.safetensors EVAL.safetensors [--bits 4 3 2] [--tools awq gptq-best ...]

Tools: rtn, awq, gptq, awq-best, gptq-best are our own, asymmetric, `best` with `--quality best`. autoawq, gptqmodel,
llmcompressor-gptq, llmcompressor-awq and autoround have environments of their own, made by interop/environments.py;
they know 4 bits, AutoRound also 2, 3. Every checkpoint is measured by `quantkit verify`, on the evaluation ids and on
the calibration ids: a method that learns its calibration text by heart shows in the gap. One JSON object for each goes
to stdout, a table to stderr. Times are of quantizing alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interop.environments import create, python

CLIENTS = Path(__file__).resolve().parents[1] / "interop" / "clients"
OWN = {
    "rtn": ["rtn"],
    "awq": ["awq"],
    "gptq": ["gptq"],
    "awq-best": ["awq", "--quality", "best"],
    "gptq-best": ["gptq", "--quality", "best"],
}
OTHERS = {  # environment, client, and what it is told
    "autoawq": ("autoawq", "write_autoawq.py", "awq asym"),
    "gptqmodel": ("gptqmodel", "write_gptqmodel.py", "gptq sym act-order"),
    "llmcompressor-gptq": ("llmcompressor", "write_llmcompressor.py", "gptq sym"),
    "llmcompressor-awq": ("llmcompressor", "write_llmcompressor.py", "awq asym"),
    "autoround": ("llmcompressor", "write_autoround.py", "{bits} asym"),
}


def main() -> None:
    """Quantize with each tool, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tools", nargs="+", default=list(OWN), choices=[*OWN, *OTHERS])
    said = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="quantkit-accuracy-") as folder:
        for tool, bits in settings(said.tools, said.bits):
            row = {"tool": tool, "bits": bits} | measured(tool, bits, said, Path(folder) / f"{tool}-{bits}")
            print(json.dumps(row), flush=True)
            rows.append(row)
    print("| tool | bits | bpw | perplexity | KL | KL on the calibration ids | top-1 | seconds |", file=sys.stderr)
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", file=sys.stderr)
    for row in rows:
        print(
            f"| {row['tool']} | {row['bits']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.4f} "
            f"| {row['kl_divergence']:.5f} | {row['kl_on_calibration']:.5f} | {row['top1_agreement']:.4f} "
            f"| {row['seconds']:.0f} |",
            file=sys.stderr,
        )


def settings(tools: list[str], bits: list[int]) -> Iterator[tuple[str, int]]:
    """The pairs that there are."""
    for tool in tools:
        for width in bits:
            if tool in OWN or tool == "autoround" or width == 4:
                yield tool, width


def measured(tool: str, bits: int, said: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Quantize into `out` and measure it."""
    began = time.monotonic()
    if tool in OWN:
        options = ["--calib", str(said.calib)] if tool != "rtn" else []
        options += ["--w-bit", str(bits), "--asym", "--group", "128", "--no-verify", "--offline", "--out", str(out)]
        quantkit(*OWN[tool], str(said.model), *options)
    else:
        environment, script, told = OTHERS[tool]
        create(environment)
        began = time.monotonic()
        command = [str(python(environment)), str(CLIENTS / script), str(said.calib), str(out), str(said.model)]
        subprocess.run([*command, told.format(bits=bits)], check=True, stdout=sys.stderr)
    seconds = time.monotonic() - began
    found, by_heart = (verified(out, said.model, ids) for ids in (said.eval, said.calib))
    names = ("perplexity", "kl_divergence", "top1_agreement")
    return {
        "bits_per_weight": found["bits_per_weight"],
        **{name: found["verification"][name] for name in names},
        "kl_on_calibration": by_heart["verification"]["kl_divergence"],
        "seconds": seconds,
    }


def verified(out: Path, model: Path, ids: Path) -> dict[str, Any]:
    """What `quantkit verify` finds."""
    limits = ["--max-ppl-increase", "1000%"]
    found: dict[str, Any] = json.loads(
        quantkit("verify", str(out), "--against", str(model), "--eval", str(ids), "--offline", "--json", *limits)
    )
    return found


def quantkit(*words: str) -> str:
    """stdout of a quantkit command."""
    done = subprocess.run([sys.executable, "-m", "quantkit", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"quantkit {' '.join(words)}: exit {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
