# SPDX-License-Identifier: Apache-2.0
"""A run: one decoder layer at a time is read, calibrated, quantized, written, read back, and run.

Token streams travel through the layers: the calibration samples and the evaluation samples on the quantized model, and
the evaluation samples once more on the original one. The quantized streams run on weights unpacked from the very
tensors that the shard holds. So every run tests the bytes that it leaves, later layers are calibrated on what they will
really see, and at the end both models have been measured in the same pass over the original. The next layer is read,
and the last one's shard hashed and written, while a layer is computed. (What attention returns to the calibration
samples may be kept from before its weights were packed: packing loses nothing.)

A finished layer is a finished shard, hashed and entered in the journal. A run that starts again takes finished shards
from the disk and only runs them.

Several processes may share a run: all go through this loop together, each with its samples, see `ranks`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.scan import require_finite_weights
from quantkit.checkpoint.writer import require_disk
from quantkit.dtypes import LARGEST_FLOAT16, SERVED, WIDER, to_stored
from quantkit.errors import OutputError
from quantkit.hardware.machine import peak_device_bytes, peak_rss_bytes
from quantkit.methods.site import SiteResult
from quantkit.methods.starved import ENOUGH, LAYER
from quantkit.methods.table import METHODS
from quantkit.model.family import Site
from quantkit.model.shortcuts import Known, Shortcut
from quantkit.model.sites import sites_of
from quantkit.model.streaming import StreamedModel, assign, move_buffers, read_outside
from quantkit.pipeline.activations import Peak, Stream
from quantkit.pipeline.compare import compare_logits, few_strange, largest, relative_error, strange_linears
from quantkit.pipeline.forward import Layer, ending_names
from quantkit.pipeline.head import head_stats, quantize_head
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import LayerResult, quantize_layer, records_of, require_sites
from quantkit.pipeline.prefetch import copied, writer
from quantkit.pipeline.resume import continued
from quantkit.pipeline.runtime import Progress
from quantkit.pipeline.shards import (
    copy_outside,
    copy_through,
    pack_layer,
    quantized_outside,
    read,
    require_planned,
    unpack_layer,
    write,
)
from quantkit.pipeline.site_inputs import Passage, observe, shortcuts_of
from quantkit.pipeline.streams import Streams, embed_run, open_run, own_samples
from quantkit.pipeline.tuning import prepare, tune_layer
from quantkit.pipeline.walk import walk
from quantkit.plan import DISK_MARGIN, OUTSIDE, LinearPlan, ShardPlan
from quantkit.quantized import parameters
from quantkit.stats import SiteStats


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    units: one record per finished unit, in order
    measured: the figures; None without evaluation
    peaks: the most bytes of RAM and of device memory that each process has held
    reused: how many units were finished before it began
    served: the dtype that it is to be served in; None: nothing says so
    """

    units: tuple[Unit, ...]
    measured: dict[str, Any] | None
    fallbacks: tuple[str, ...]
    peaks: tuple[tuple[int, int], ...]
    reused: int = 0
    served: str | None = None


@torch.no_grad()
def run(
    job: Job,
    progress: Progress,
    *,
    fresh: bool = False,
    finish: Callable[[Outcome], None] = lambda outcome: None,
    enough: Callable[[Sequence[Unit]], bool] = lambda units: False,
    made: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """Quantize a model into the runtime's folder; the checkpoint's shards and the journal are written, nothing else.

    finish: called at the end, while the folder is still locked, to write what belongs beside the shards; of several
    processes by the first
    enough: asked, in the same way, where all is finished and sound before the work begins: whether nothing is left to
    do, not even to measure; then None is returned
    made: whether the file that the shards were for is there, so that they need not be

    Raises:
        OutputError: the folder is busy, foreign, or of another run; the disk is too small.
        NumericsError: weights, activations or statistics that are not finite, with the layer's name.
        RankError: another process of the run is gone.
    """
    folder, plan = job.runtime.folder, job.plan
    missing = [shard.file_bytes for shard in plan.shards if not (folder / shard.file).exists()]
    require_disk(folder, sum(missing) + plan.beside_bytes + DISK_MARGIN)
    sites = sites_of(job.runtime.model)
    require_sites(job, sites)
    done = not fresh and made()
    with continued(job, fresh, look=not done) as journal:
        units = [journal.finished[shard.unit] for shard in plan.shards if shard.unit in journal.finished]
        if len(units) == len(plan.shards) and enough(units):
            return None
        if done and len(units) == len(job.plan.shards):
            raise OutputError(
                f"{folder}: finished, but not measured as asked now; `quantkit verify {folder}` measures it with "
                "other options, --fresh makes it again"
            )
        if not units:
            require_finite_weights(job.runtime.model.checkpoint, parameters(job.runtime.model))
        outcome = _run_and_widen(job, sites, journal, progress)
        if job.runtime.ranks.first:
            finish(outcome)
        return outcome


def _run_and_widen(job: Job, sites: Sequence[Sequence[Site]], journal: Journal, progress: Progress) -> Outcome:
    """The run. Where numbers beyond float16 turned up, the figures are those of bfloat16, which it is then served in.

    For those all shards are run once more, as an engine has them in bfloat16.
    """
    job = replace(job, served=_served(job))
    outcome, peak = _run(job, sites, journal, progress)
    if peak.value <= LARGEST_FLOAT16 or job.served == WIDER:
        return outcome
    reached = f"numbers reach {peak.value:,.0f} in {peak.where}, and float16 ends at {LARGEST_FLOAT16:,.0f}"
    if job.served is None:
        note = f"{reached}: kernels that compute in float16 give no numbers there"
        return replace(outcome, fallbacks=(*outcome.fallbacks, note))
    note = f"{reached}: config.json says {WIDER}, and the figures are of weights in it; serve it so"
    measured = outcome.measured
    if measured is not None:
        progress.ending(f"measure once more, in {WIDER}")
        wider = replace(job, served=WIDER, calibration=None)
        measured = _run(wider, sites, journal, progress)[0].measured
    return replace(outcome, served=WIDER, measured=measured, fallbacks=(*outcome.fallbacks, note))


def _served(job: Job) -> str | None:
    """The dtype to begin with. A tower stored in bfloat16 keeps it: nothing that it computes is seen here."""
    if job.plan.format.block_bytes is not None:
        return None
    model = job.runtime.model
    towers = {dtype for dtype, _ in model.copied.values()} if model.wrapped else set()
    return WIDER if WIDER in towers else SERVED


def _run(job: Job, sites: Sequence[Sequence[Site]], journal: Journal, progress: Progress) -> tuple[Outcome, Peak]:
    """The run, and the largest magnitude that any stream has met."""
    runtime, plan = job.runtime, job.plan
    model = runtime.model
    move_buffers(model.model, runtime.device)
    sets = [job.evaluation, job.evaluation, job.calibration, job.reference]
    tokens = sum(each.input_ids.numel() for each in sets if each)
    # The reference samples are chosen from all samples; the job has only this rank's from here on.
    reference = own_samples(job, job.reference)
    job = replace(job, calibration=own_samples(job, job.calibration), evaluation=own_samples(job, job.evaluation))
    gram_samples = job.calibration.samples if job.calibration else 0
    job = replace(job, calibration=prepare(job, journal, progress))
    reference = job.calibration if job.options.tune else reference
    shards = {shard.unit: shard for shard in plan.shards}
    reused = len(shards.keys() & journal.finished.keys())
    copy_outside(job, journal, shards["embeddings"])
    copy_through(job, journal)
    for name in _kept_vectors(model):  # what cannot be stored is told now, not after hours
        to_stored(name, read_outside(model, [name])[name])
    streams = open_run(job, reference, gram_samples)
    progress.start(len(model.layers), tokens, streams.places)
    embed_run(job, streams, shards["embeddings"])
    through = _through_layers(job, sites, journal, streams, progress)

    if plan.head is not None and plan.head.scheme is not None and "head" not in journal.finished:
        progress.ending("quantize lm_head")
        _quantize_head(job, journal, shards["head"], plan.head, streams)
    elif "head" in shards:
        copy_outside(job, journal, shards["head"])
    measured = None
    if job.evaluation and streams.original and streams.quantized:
        progress.ending("compare the logits")
        source = runtime.loaded(read_outside(model, ending_names(model)))
        stored = quantized_outside(job, source)
        (measured,) = compare_logits(runtime, job.evaluation, streams.original, [streams.quantized], source, stored)
        peak = largest([streams.original, streams.quantized], runtime.ranks)
        measured |= through | {"largest_activation": peak.value, "torch_dtype": job.served}
    units = tuple(unit for unit in journal.finished.values() if unit.unit in shards)
    peaks = runtime.ranks.gather(torch.tensor([[peak_rss_bytes(), peak_device_bytes(runtime.device)]])).tolist()
    most = tuple((rss, device) for rss, device in peaks)
    outcome = Outcome(units, measured, _fallbacks(job, journal, streams), most, reused, job.served)
    return outcome, largest(streams.all, runtime.ranks)


def _kept_vectors(model: StreamedModel) -> list[str]:
    """The tensors outside the layers, and what stays in 16 bit of each: norms and biases."""
    return [name for name, shape in parameters(model).items() if name in model.outside() or len(shape) == 1]


def _through_layers(
    job: Job, sites: Sequence[Sequence[Site]], journal: Journal, streams: Streams, progress: Progress
) -> dict[str, Any]:
    """Quantize all layers, or take those that are finished, and bring the streams behind the last one.

    Returns:
        What a verification says of the layers, where both models are evaluated: see `records.Measured`.
    """
    runtime = job.runtime
    shards = {shard.unit: shard for shard in job.plan.shards}
    finished = set(journal.finished)  # when the run began
    unfinished = [linear.layer for linear in job.plan.quantized if linear.unit not in finished]
    layer_errors: list[dict[str, Any]] = []
    strange: list[dict[str, Any]] = []
    with walk(runtime, progress, sites=sites) as layers, writer() as writing:
        for layer in layers:
            if streams.original:
                progress.stage("run the original")
                layer.advance(streams.original)
            shard = shards[f"layer.{layer.index}"]
            more = any(index > layer.index or index == OUTSIDE for index in unfinished)  # need calibration after it
            known: Mapping[Shortcut, Known] = {}
            if shard.unit in finished:
                if streams.calibration and job.inputs == "original":
                    progress.stage("run the original")
                    layer.advance(streams.calibration)
                if streams.reference and more:
                    progress.stage("run the original")
                    layer.advance(streams.reference)
                stored, records = read(job, shard), journal.finished[shard.unit].record["linears"]
            else:
                result, known = _quantize(job, layer, streams, more=more)
                progress.stage("write")
                stored, records = pack_layer(job, layer, shard, result), result.records
                if runtime.ranks.first:
                    writing.submit(partial(write, journal, shard, copied(stored), records))
                del result
            unpacked = unpack_layer(job, layer, stored)
            if streams.quantized:
                strange += strange_linears(layer.weights, unpacked, job.plan.layer(layer.index))
            layer.forget_original()

            layer.load(unpacked)
            del stored, unpacked
            progress.stage("run the quantized")
            if streams.quantized:
                layer.advance(streams.quantized)
            if streams.calibration and more and job.inputs == "quantized":
                layer.advance(streams.calibration, known=known)
            elif streams.calibration and not streams.quantized:  # a few samples show how large numbers become
                some = streams.calibration.states[: streams.calibration.batch]
                layer.advance(replace(streams.calibration, states=some))
            del known
            if streams.original and streams.quantized:
                error = relative_error(runtime.model, streams.original, streams.quantized, runtime.ranks)
                layer_errors.append({"layer": layer.index, "relative_error": error})
            loss = max((record["loss"] for record in records), default=0.0)
            progress.finished(layer.index, loss, shard.unit in finished)
    vocabulary = {"vocabulary": runtime.model.config.vocab_size}
    return {"layer_errors": layer_errors} | vocabulary | few_strange(strange, len(job.plan.quantized))


def _quantize(job: Job, layer: Layer, streams: Streams, *, more: bool) -> tuple[LayerResult, Mapping[Shortcut, Known]]:
    """Quantize the layer, and bring the reference stream behind it; with what is known of the calibration samples.

    more: whether anything after the layer is calibrated too
    """
    calibration, reference = streams.calibration, streams.reference
    observed: Sequence[SiteStats] | None = None
    passage = followed = None
    to_end = more or job.options.tune  # tuning aims at what the original's layer returns
    if calibration and job.inputs == "original":
        layer.progress.stage("calibrate on the original")
        observed = observe(layer, calibration)
    elif calibration:
        passage = Passage(layer, calibration, streams.gram_samples, _shortcuts(job, layer, calibration))
        if reference:
            samples = min(passage.samples, len(reference.states))
            followed = replace(
                passage, stream=reference, samples=samples, weights=layer.weights, known={}, run_to_end=to_end
            )
    result = quantize_layer(job, layer, passage, followed, observed)
    if reference and to_end:
        layer.progress.stage("run the original")
        assign(layer.module, layer.weights)
        layer.advance(reference, first=followed.finished if followed else 0)
    if job.options.tune and passage and reference:
        layer.progress.stage("tune")
        tune_layer(job, layer, result, passage.stream, reference)
    return result, passage.known if passage else {}


def _shortcuts(job: Job, layer: Layer, calibration: Stream) -> tuple[Shortcut, ...]:
    """What need not run again for every site. Tuning moves all weights and runs all samples: nothing is kept for it."""
    widest = job.runtime.memory.kept_width
    return shortcuts_of(layer, calibration, widest) if widest and not job.options.tune else ()


def _quantize_head(job: Job, journal: Journal, shard: ShardPlan, head: LinearPlan, streams: Streams) -> None:
    """Quantize the head from streams that have left the last layer, and write it with what else comes after those."""
    runtime, calibration = job.runtime, streams.calibration
    assert head.scheme is not None
    stats = None
    if calibration is not None and METHODS[job.method_of(head)].calibrates:
        stats = head_stats(runtime, calibration, streams.reference, streams.gram_samples)
    weight = f"{head.name}.weight"
    outside = runtime.model.outside()
    source = read_outside(runtime.model, [*(name for name in shard.tensors if name in outside), weight])
    whole = source.pop(weight).to(runtime.device)
    rounded, record = quantize_head(whole, head.scheme, job.options, stats, job.plan.format, runtime.ranks)
    tensors = {name: to_stored(name, tensor) for name, tensor in source.items()}
    tensors |= {f"{head.name}.{key}": tensor for key, tensor in job.plan.format.pack(rounded).items()}
    require_planned(shard, tensors)
    outcome = SiteResult({head.local: rounded}, None, {head.local: record})
    if runtime.ranks.first:
        write(journal, shard, copied(tensors), records_of(job, outcome, {head.local: head}))
    runtime.ranks.wait()  # the others read it


def _fallbacks(job: Job, journal: Journal, streams: Streams) -> tuple[str, ...]:
    model = job.runtime.model
    fallbacks = [f"tensor {name} has no place in the architecture and was left out" for name in model.ignored]
    if model.copied:
        parts = ", ".join(model.copied_parts())
        fallbacks.append(f"{len(model.copied)} tensors beside the text decoder are copied as they are: {parts}")
    kept = [linear for linear in job.plan.linears if linear.role.sixteen_bit and linear.scheme is None]
    if kept:
        kinds = ", ".join(sorted({linear.local.rpartition(".")[2] for linear in kept}))
        fallbacks.append(f"{len(kept)} small linears stay in 16 bit, as in engines: {kinds}; a recipe may name them")
    if any(stream and stream.place == "file" for stream in (streams.calibration, streams.original)):
        fallbacks.append("hidden states did not fit in memory and were mapped from a file")
    raised = [r for unit in journal.finished.values() for r in unit.record["linears"] if "damp_raised_to" in r]
    fallbacks += [f"{r['name']}: damping raised to {r['damp_raised_to']:g} to factorise its inputs" for r in raised]
    few = [r for unit in journal.finished.values() for r in unit.record["linears"] if "fallback" in r]
    if few:
        least, leaning = min(r["tokens"] for r in few), sum(r["fallback"] == LAYER for r in few)
        fallbacks.append(
            f"{len(few)} linears of experts saw fewer than {ENOUGH} calibration tokens for each input (the least "
            f"{least}): {leaning} lean on what their layer reads, {len(few) - leaning} are rounded to nearest; "
            "more --samples help"
        )
    tuned = [r for unit in journal.finished.values() for r in unit.record["linears"] if "tuning" in r]
    if worse := [r for r in tuned if not r["tuning"]["kept"]]:
        fallbacks.append(
            f"--quality best: {len(worse)} of {len(tuned)} linears were no better for tuning, by the samples kept back "
            "to judge, and stayed as they were; more --samples help"
        )
    return tuple(fallbacks)
