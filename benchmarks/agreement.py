# SPDX-License-Identifier: Apache-2.0
"""Do the figures agree? A run's own, those of `quantkit verify`, and an evaluation that shares no code with either.

    python benchmarks/agreement.py MODEL EVAL.safetensors CHECKPOINT ...

The independent evaluation is transformers' forward of the whole model in float32, on the weights that the files stand
for, with perplexity, KL and top-1 agreement in float64 from their definitions. Checkpoints may be of any tool.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.document import RESULT
from quantkit.model.streaming import open_model
from quantkit.remeasure import open_quantized
from quantkit.reverify import VerifyRequest, verify_files

FIGURES = ("perplexity", "perplexity_fp16", "kl_divergence", "top1_agreement")


@torch.inference_mode()
def independent(model: Path, out: Path, ids: Tensor) -> dict[str, float]:
    """The figures from their definitions."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    original = open_model(model)
    stored = open_quantized(out, original).read([name for name, _ in quantized.named_parameters()])
    quantized.load_state_dict({name: t.float() for name, t in stored.items()}, strict=not original.tied)
    nll = nll_reference = kl = agreed = 0.0
    for row in ids:
        p, q = (m(row[None]).logits[0, :-1].double().log_softmax(-1) for m in (reference, quantized))
        target = row[1:, None]
        nll_reference -= float(p.gather(-1, target).sum())
        nll -= float(q.gather(-1, target).sum())
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = ids.shape[0] * (ids.shape[1] - 1)
    exps = [float(torch.tensor(x / count, dtype=torch.float64).exp()) for x in (nll, nll_reference)]
    return dict(zip(FIGURES, (*exps, kl / count, agreed / count), strict=True))


def main() -> int:
    """Print one JSON line a checkpoint; 1 if any figure is more than --within apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--within", type=float, default=1e-3)
    said = parser.parse_args()
    worst = 0.0
    for out in said.checkpoints:
        request = VerifyRequest(
            out=out, command="agreement", against=str(said.model), evaluation=str(said.ids), offline=True
        )
        in_run = {}
        if (out / RESULT).is_file():
            in_run = json.loads((out / RESULT).read_text())["verification"]
        measured = verify_files(request, Console(quiet=True))["verification"]
        expected = independent(said.model, out, load_file(said.ids)["input_ids"].long())
        apart = {
            name: {key: abs(found[key] / expected[key] - 1) for key in FIGURES}
            for name, found in (("run", in_run), ("verify", measured))
            if found
        }
        worst = max(worst, *(value for figures in apart.values() for value in figures.values()))
        print(json.dumps({"checkpoint": out.name, "independent": expected, "apart": apart}), flush=True)
    return int(worst > said.within)


if __name__ == "__main__":
    sys.exit(main())
