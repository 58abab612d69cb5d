# SPDX-License-Identifier: Apache-2.0
"""`--quality best`: a rounded layer tuned towards what the original layer made of the same tokens.

The tokens are the calibration samples and copies of them that the original model has rewritten (`resample`), and an
error of the output weighs what it does to the original model's predictions (`fisher`). Both are made before the first
layer, from the original model alone, and kept in the output folder for a run that starts again.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import require_disk, write_shard
from quantkit.grids.registry import dequantize
from quantkit.hardware.batching import TOKENS_A_STEP
from quantkit.methods.tune import Loss, tune
from quantkit.model.streaming import embed, run_layer
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.fisher import output_directions, spilled_bytes, weighted_square
from quantkit.pipeline.forward import Layer
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import LayerResult, assign_float
from quantkit.pipeline.resample import resample
from quantkit.pipeline.runtime import Progress
from quantkit.scheme import QuantizedTensor

TUNING = "tuning"
TUNING_FILE = f"{TUNING}.st"  # not *.safetensors: engines load all that are called so
PASSES = 2  # over the tokens, for each layer
JUDGES = 32  # one step in so many is kept back to judge the others


def prepare(job: Job, journal: Journal, progress: Progress) -> TokenSet | None:
    """The tokens that layers are calibrated on: for tuning, the calibration set and its rewritten copies.

    With the directions that `layer_directions` reads, what tuning needs of the original model is written here, once.
    """
    tokens = job.calibration
    if tokens is None or not job.options.tune:
        return tokens
    runtime = job.runtime
    if TUNING not in journal.finished:
        require_disk(runtime.folder, spilled_bytes(runtime, tokens))
        ids = tokens.input_ids
        if job.tuning_copies:
            ids = torch.cat([ids, resample(runtime, tokens, job.tuning_copies, progress)])
        directions = output_directions(runtime, tokens, progress)
        tensors = {"input_ids": ids} | {f"directions.{index}": v for index, v in enumerate(directions)}
        sha256 = write_shard(runtime.folder / TUNING_FILE, tensors)
        journal.append(Unit(TUNING, TUNING_FILE, sha256, {"linears": []}))
    return replace(tokens, input_ids=open_file(runtime.folder / TUNING_FILE).read("input_ids"))


def layer_directions(layer: Layer) -> Tensor:
    """The directions of the layer's output that matter; see `fisher.weighted_square`."""
    runtime = layer.runtime
    return open_file(runtime.folder / TUNING_FILE).read(f"directions.{layer.index}").to(runtime.device)


def _samples_a_step(seqlen: int) -> int:
    return max(1, TOKENS_A_STEP // seqlen)


def learn_sizes(job: Job, calibration: Stream | None, samples: int) -> None:
    """Let the model show what its layers are called with at the sizes that tuning needs; inside `outside_loaded`.

    Those are of its steps, and of the micro-batches of the first samples alone, which Gram matrices are made of.
    """
    if calibration is not None and job.calibration is not None and job.options.tune:
        step = _samples_a_step(job.calibration.seqlen)
        sizes = {min(step, job.calibration.samples), job.calibration.samples % step, samples % calibration.batch}
        for size in sorted(sizes - {0}):
            embed(job.runtime.model, job.calibration.input_ids[:size].to(job.runtime.device))


def _steps(samples: int, step: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Which samples each step learns from, and which are kept back to judge, so many at a time."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(samples, generator=generator).split(step)
    judges = -(-len(parts) // JUDGES)
    rest = [sample for part in parts[:-judges] for sample in part.tolist()]
    passes = [torch.tensor(rest)[torch.randperm(len(rest), generator=generator)] for _ in range(PASSES) if rest]
    return [part for each in passes for part in each.split(step)], list(parts[-judges:])


def tune_layer(job: Job, layer: Layer, result: LayerResult, calibration: Stream, reference: Stream) -> None:
    """Tune the layer's codes and scales towards the original's outputs, which `reference` holds already.

    Samples come in an order of their own for each layer and pass. Some of them only judge: a layer that they find no
    better stays as it was.
    """
    runtime = layer.runtime
    assign_float(layer.module, result.changed)
    step = _samples_a_step(calibration.states.shape[1])
    directions = layer_directions(layer)

    def loss(samples: Tensor) -> Loss:
        def of(weights: Mapping[str, Tensor]) -> Tensor:
            inputs, target = (stream.states[samples].to(runtime.device) for stream in (calibration, reference))
            named = {f"{name}.weight": weight for name, weight in weights.items()}
            output = run_layer(runtime.model, layer.index, inputs, named, exact=False)
            energy = target.float().square().sum(-1).mean()
            return weighted_square(output.float() - target.float(), directions) / energy

        return of

    training, judging = _steps(len(calibration.states), step, layer.index)
    losses, judges = [loss(samples) for samples in training], [loss(samples) for samples in judging]

    def judged(quantized: Mapping[str, QuantizedTensor]) -> float:
        weights = {name: dequantize(q, runtime.dtype) for name, q in quantized.items()}
        return sum(float(judge(weights)) for judge in judges) / len(judges)

    tuned = tune(result.quantized, result.offsets, losses, runtime.dtype) if losses else result.quantized
    tuned = {name: job.plan.format.settle(quantized) for name, quantized in tuned.items()}
    before, after = judged(result.quantized), judged(tuned)
    records = {record["name"].removeprefix(f"{layer.name}."): record for record in result.records}
    for name, quantized in tuned.items():
        moved = float((quantized.codes != result.quantized[name].codes).float().mean())
        records[name]["tuning"] = {"kept": after < before, "error_before": before, "error": after, "codes_moved": moved}
    if after < before:
        result.quantized = tuned
