# SPDX-License-Identifier: Apache-2.0
"""Do the figures agree? A run's own, those of `quantkit verify`, and an evaluation that shares no code with either.

    python benchmarks/agreement.py MODEL EVAL.safetensors CHECKPOINT ...

The independent evaluation is transformers' forward of the whole model in float32, on weights unpacked here from the
definitions of the formats (4 bits only), with perplexity, KL and top-1 agreement in float64 from theirs. Checkpoints
may be of any tool.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.report.terminal.screen import Terminal
from quantkit.results.document import RESULT

FIGURES = ("perplexity", "perplexity_fp16", "kl_divergence", "top1_agreement")
NATURAL, AWQ = range(8), (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds its n-th value


def unpack(words: Tensor, dim: int, nibbles: Iterable[int] = NATURAL) -> Tensor:
    """int32 words, each of eight values that lie one after the other along `dim`, as int32 values 0..15."""
    return torch.stack([words >> 4 * nibble & 15 for nibble in nibbles], dim + 1).flatten(dim, dim + 1)


def weight(name: str, stored: dict[str, Tensor], quantization: dict[str, Any]) -> Tensor:
    """The weight [out, in] of a linear, float32, by what is said of AWQ GEMM, GPTQ and pack-quantized."""

    def part(key: str) -> Tensor:
        return stored[f"{name}.{key}"]

    if quantization["quant_method"] == "compressed-tensors":
        codes, scales = unpack(part("weight_packed"), 1) - 8, part("weight_scale").float()
        columns = codes.shape[1] // scales.shape[1]
        zeros = unpack(part("weight_zero_point"), 0) - 8 if f"{name}.weight_zero_point" in stored else 0 * scales
        return (codes - zeros.repeat_interleave(columns, 1)) * scales.repeat_interleave(columns, 1)
    scales = part("scales").float()
    if quantization["quant_method"] == "awq":
        codes, zeros = unpack(part("qweight"), 1, AWQ), unpack(part("qzeros"), 1, AWQ)
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
    else:
        codes, zeros = unpack(part("qweight"), 0), unpack(part("qzeros"), 1)
        zeros += quantization.get("checkpoint_format", "gptq") == "gptq"  # v1 stores one less
        group = part("g_idx").long()
    return ((codes - zeros[group]) * scales[group]).T


def dequantized(out: Path) -> dict[str, Tensor]:
    """Every parameter of a checkpoint by its plain name, float32."""
    raw = json.loads((out / "config.json").read_text())
    stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    packed = {name.rpartition(".")[0] for name in stored if name.endswith((".qweight", ".weight_packed"))}
    plain = {name: t.float() for name, t in stored.items() if name.rpartition(".")[0] not in packed or "bias" in name}
    return plain | {f"{name}.weight": weight(name, stored, raw["quantization_config"]) for name in packed}


@torch.inference_mode()
def independent(model: Path, out: Path, ids: Tensor) -> dict[str, float]:
    """The figures from their definitions."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    missing, unknown = quantized.load_state_dict(dequantized(out), strict=False)
    assert not unknown
    assert set(missing) <= ({"lm_head.weight"} if quantized.config.tie_word_embeddings else set())
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
        measured = verify_files(request, Terminal(quiet=True)).content()["verification"]
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
