# SPDX-License-Identifier: Apache-2.0
"""`--quality best`: a rounded layer tuned towards what the original layer made of the same tokens.

The tokens are the calibration samples and copies of them that the original model has rewritten (`resample`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.activations import TOKENS_A_STEP, Stream
from quantkit.calibration import TokenSet
from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import write_shard
from quantkit.evaluation import Progress
from quantkit.job import Job
from quantkit.layer import LayerResult, assign_float
from quantkit.model.streaming import embed, run_layer
from quantkit.quantize.tune import Loss, tune
from quantkit.resample import resample
from quantkit.scheme import QuantizedTensor, dequantize

TUNING = "tuning-tokens"
JUDGES = 32  # one step in so many is kept back to judge the others


def tuning_tokens(job: Job, journal: Journal, progress: Progress) -> TokenSet | None:
    """The calibration set; for tuning, with copies that the original model has rewritten, kept for a next start."""
    tokens = job.calibration
    if tokens is None or not job.options.tune:
        return tokens
    copies = job.tuning_copies
    if copies == 0:
        return tokens
    unit = journal.finished.get(TUNING)
    if unit is None:
        spill = job.out / ".rewritten-states.tmp"
        ids = resample(job.model, tokens, copies, job.device, job.dtype, progress, spill, job.place)
        file = f"{TUNING}.st"  # not *.safetensors: engines load all that are called so
        unit = Unit(TUNING, file, write_shard(job.out / file, {"input_ids": ids}), {"linears": []})
        journal.append(unit)
    ids = torch.cat([tokens.input_ids, open_file(job.out / unit.file).read("input_ids")])
    return replace(tokens, input_ids=ids)


def _samples_a_step(seqlen: int) -> int:
    return max(1, TOKENS_A_STEP // seqlen)


def learn_steps(job: Job) -> None:
    """Let the model show what its layers are called with at the sizes of tuning's steps; inside `outside_loaded`."""
    if job.options.tune and job.calibration is not None:
        step = _samples_a_step(job.calibration.seqlen)
        for samples in {min(step, job.calibration.samples), job.calibration.samples % step} - {0}:
            embed(job.model, job.calibration.input_ids[:samples].to(job.device))


def tune_layer(job: Job, index: int, result: LayerResult, calibration: Stream, wanted: Stream) -> None:
    """Tune the layer's codes and scales towards the original's outputs; `wanted` holds those already.

    Every sample is seen once, in an order of its own for each layer. The last ones only judge: a layer that they
    find no better stays as it was.
    """
    layer = job.model.layers[index]
    assign_float(layer, result.changed)
    seqlen = calibration.states.shape[1]
    step = _samples_a_step(seqlen)
    order = torch.randperm(len(calibration.states), generator=torch.Generator().manual_seed(index))

    def loss(samples: Tensor) -> Loss:
        def of(weights: Mapping[str, Tensor]) -> Tensor:
            inputs, target = (stream.states[samples].to(job.device) for stream in (calibration, wanted))
            output = run_layer(job.model, index, inputs, {f"{name}.weight": w for name, w in weights.items()})
            return (output.float() - target.float()).square().mean() / target.float().square().mean()

        return of

    losses = [loss(samples) for samples in order.split(step)]
    judges = -(-len(losses) // JUDGES)
    seen, kept_back = losses[:-judges], losses[-judges:]

    def judged(quantized: Mapping[str, QuantizedTensor]) -> float:
        weights = {name: dequantize(q, job.dtype) for name, q in quantized.items()}
        return sum(float(loss(weights)) for loss in kept_back) / judges

    tuned = tune(result.quantized, result.offsets, seen, job.dtype) if seen else result.quantized
    before, after = judged(result.quantized), judged(tuned)
    records = {record["name"].removeprefix(f"{job.model.layer_name(index)}."): record for record in result.records}
    for name, quantized in tuned.items():
        moved = float((quantized.codes != result.quantized[name].codes).float().mean())
        records[name]["tuning"] = {"kept": after < before, "error_before": before, "error": after, "codes_moved": moved}
    if after < before:
        result.quantized = tuned
