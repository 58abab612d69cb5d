# SPDX-License-Identifier: Apache-2.0
"""What the verdict's limits stand on: the figures of sound checkpoints, and of checkpoints with one broken linear.

    python benchmarks/verdict.py demo
    python benchmarks/verdict.py MODEL --calib CALIB.safetensors --eval EVAL.safetensors

Each method makes 8, 4, 3 and 2 bits in groups of 128. Then one linear of rtn's 4 bits is broken in several ways. A row
says what perplexity, KL and top-1 agreement come to, the largest relative error of a linear's weights that scales of
rows and columns leave, and how often that is the error of rounding to nearest.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.grids.registry import dequantize
from quantkit.methods import rtn
from quantkit.model.streaming import open_model
from quantkit.pipeline.compare import weight_error
from quantkit.quantized import open_quantized
from quantkit.records import Verification
from quantkit.report.terminal.screen import Terminal
from quantkit.settings.defaults import find_model

VERDICT_FAIL = 3
BITS, METHODS = (8, 4, 3, 2), ("rtn", "gptq", "awq")
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def swap_nibbles(words: Tensor) -> Tensor:
    values = words.view(torch.uint8)
    return (values >> 4 | values << 4).view(torch.int32)


BREAKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "any integers": ("qweight", lambda q: torch.randint(-(2**31), 2**31 - 1, q.shape, generator=seeded()).int()),
    "nibbles swapped": ("qweight", swap_nibbles),
    "zero": ("scales", torch.zeros_like),
    "scales of other rows": ("scales", lambda s: s[:, torch.randperm(s.shape[1], generator=seeded())].contiguous()),
    "scales of other groups": ("scales", lambda s: s.roll(1, 0).contiguous()),
}


def quantized(method: str, model: str, bits: int, out: Path, more: list[str]) -> Path:
    words = [method, model, "--w-bit", str(bits), "--group", "128", "--format", "gptq", "--out", str(out), *more]
    code = subprocess.run([sys.executable, "-m", "quantkit", *words], stdout=subprocess.DEVNULL, check=False).returncode
    if code not in (0, VERDICT_FAIL):
        raise SystemExit(f"{' '.join(words)}: exit {code}")
    return out


def broken(good: Path, out: Path, linear: str, part: str, change: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(good, out, dirs_exist_ok=True)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if (name := f"{linear}.{part}") in tensors:
            save_file(tensors | {name: change(tensors[name])}, path, metadata={"format": "pt"})
    return out


def worst_weights(model: Path, out: Path) -> tuple[float, float]:
    """The largest error of a linear's weights, and the largest in errors of rounding to nearest."""
    original = open_model(model)
    checkpoint = open_quantized(out)
    errors = []
    for linear in checkpoint.decoder:
        name = f"{linear.name}.weight"
        weight = original.checkpoint.read(name).float()
        assert linear.scheme is not None
        nearest = dequantize(rtn.quantize(weight, linear.scheme, search=False))
        error = weight_error(weight, checkpoint.read([name])[name])
        errors.append((error, error / float((nearest - weight).square().sum() / weight.square().sum())))
    return max(error for error, _ in errors), max(times for _, times in errors)


def show(label: str, measured: Verification, weights: tuple[float, float]) -> None:
    rise, kl, top1 = measured.increase, measured.kl_divergence, measured.top1_agreement
    print(f"| {label} | {rise:+.2%} | {kl:.4f} | {top1:.2%} | {weights[0]:.4f} | {weights[1]:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", default="mix")
    parser.add_argument("--eval", default="eval")
    said = parser.parse_args()
    model = find_model(said.model, offline=True)
    print("| checkpoint | perplexity | KL | top-1 | weight error | times nearest |\n| --- |" + " ---: |" * 5)
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            calib = [] if method == "rtn" else ["--calib", said.calib, "--samples", "64"]
            for bits in BITS:
                more = [*calib, "--eval", said.eval, "--eval-samples", "16"]
                out = quantized(method, said.model, bits, Path(folder, f"{method}-{bits}"), more)
                result = json.loads((out / "quantkit.json").read_text())
                show(f"{method}, {bits} bits", Verification(**result["verification"]), worst_weights(model, out))
        for kind in LINEARS:
            for how, (part, change) in BREAKS.items():
                linear = f"model.layers.1.{kind}"
                out = broken(Path(folder, "rtn-4"), Path(folder, "broken"), linear, part, change)
                request = VerifyRequest(out=out, command="verify", against=said.model, offline=True)
                found = verify_files(request, Terminal(quiet=True)).verification
                assert found is not None
                show(f"{kind}: {how}", found, worst_weights(model, out))


if __name__ == "__main__":
    main()
