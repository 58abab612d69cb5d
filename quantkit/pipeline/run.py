# SPDX-License-Identifier: Apache-2.0
"""The loop: one decoder layer at a time is read, calibrated, quantized, written, read back, and run.

Token streams travel through the layers beside it: the calibration samples and the evaluation samples on the quantized
model, and the evaluation samples once more on the original one. The quantized streams run on weights unpacked from the
very tensors that the shard holds, so every run tests the bytes that it leaves, later layers are calibrated on what they
will really see, and at the end both models have been measured in the same pass over the original. The next layer is
read, and the last one's shard hashed and written, while a layer is computed. (What attention returns to the calibration
samples may be kept from before its weights were packed: packing loses nothing.)

A finished layer is a finished shard, hashed and entered in the journal. A run that starts again takes finished shards
from the disk and only runs them.

Several processes may share a run: all go through this loop together, each with its samples, see `ranks`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.journal import Journal, Unit, open_journal
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import require_disk, write_shard
from quantkit.dtypes import dtype_name, to_stored
from quantkit.errors import OutputError, SchemeError
from quantkit.hardware.machine import peak_device_bytes, peak_rss_bytes, pin, return_freed_memory
from quantkit.methods.site import SiteResult
from quantkit.methods.table import METHODS
from quantkit.model.families import Site
from quantkit.model.shortcuts import Known, Shortcut
from quantkit.model.sites import sites_of
from quantkit.model.streaming import (
    assign,
    drop,
    embedding_names,
    layer_room,
    move_buffers,
    outside_loaded,
    read_layer,
    read_outside,
)
from quantkit.pipeline.activations import Stream, choose_place
from quantkit.pipeline.forward import (
    Progress,
    advance,
    compare,
    embed_tokens,
    ending_names,
    loaded,
    observe,
    open_states,
    relative_error,
)
from quantkit.pipeline.head import head_stats, quantize_head
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import LayerResult, quantize_layer, records_of
from quantkit.pipeline.prefetch import copied, read_ahead, writer
from quantkit.pipeline.site_inputs import Passage, shortcuts_of
from quantkit.pipeline.tuning import TUNING, learn_sizes, prepare, tune_layer
from quantkit.plan import DISK_MARGIN, OUTSIDE, LinearPlan, ShardPlan
from quantkit.quantized import dequantized
from quantkit.stats import SiteStats


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: one record per finished unit, in order, and the measurements (None without evaluation);
    peaks: bytes of RAM and of device memory that each process has held at most; reused: how many units were finished
    before it began.
    """

    units: tuple[Unit, ...]
    measured: dict[str, Any] | None
    fallbacks: tuple[str, ...]
    peaks: tuple[tuple[int, int], ...]
    reused: int = 0


@torch.no_grad()
def run(
    job: Job,
    progress: Progress,
    *,
    fresh: bool = False,
    finish: Callable[[Outcome], None] = lambda outcome: None,
    enough: Callable[[Sequence[Unit]], bool] = lambda units: False,
) -> Outcome | None:
    """Quantize a model into `job.out`; the checkpoint's shards and the journal are written, nothing else.

    finish: called at the end, while the folder is still locked, to write what belongs beside the shards; of several
    processes by the first. enough: asked, in the same way, where all is finished and sound before the work begins:
    whether nothing is left to do, not even to measure; then None is returned.

    Raises:
        OutputError: the folder is busy, foreign, or of another run; the disk is too small.
        NumericsError: weights, activations or statistics that are not finite, with the layer's name.
        RankError: another process of the run is gone.
    """
    missing = [shard.file_bytes for shard in job.plan.shards if not (job.out / shard.file).exists()]
    require_disk(job.out, sum(missing) + job.plan.beside_bytes + DISK_MARGIN)
    sites = sites_of(job.model)
    _require_one_method(job, sites)
    with _continued(job, fresh) as journal:
        units = [journal.finished[shard.unit] for shard in job.plan.shards if shard.unit in journal.finished]
        if len(units) == len(job.plan.shards) and enough(units):
            return None
        outcome = _run(job, sites, journal, progress)
        if job.ranks.first:
            finish(outcome)
        return outcome


@contextmanager
def _continued(job: Job, fresh: bool) -> Iterator[Journal]:
    """The run's journal, with what is finished and sound; ranks that do not write have a copy."""
    if not job.ranks.first:
        units = [Unit(**fields) for fields in job.ranks.agree(None)]
        yield Journal(job.out, -1, {unit.unit: unit for unit in units})
        return
    with open_journal(job.out, job.identity(), fresh=fresh) as journal:
        if TUNING in journal.finished and not journal.verify_unit(journal.finished[TUNING]):
            journal.drop_from(TUNING)
        _compare_recipes(job, journal)
        for shard in job.plan.shards:
            unit = journal.finished.get(shard.unit)
            if unit is not None and not journal.verify_unit(unit):
                journal.drop_from(shard.unit)
        job.ranks.agree([vars(unit) for unit in journal.finished.values()])
        yield journal


def _require_one_method(job: Job, sites: tuple[Site, ...]) -> None:
    for index in range(len(job.model.layers)):
        linears = job.plan.layer(index)
        for site in sites:
            found = {job.method_of(linears[name]) for name in site.linears}
            if len(found) > 1:
                names = ", ".join(linears[name].name for name in site.linears)
                raise SchemeError(f"{names} read the same input: give them one method, got {', '.join(sorted(found))}")


def _compare_recipes(job: Job, journal: Journal) -> None:
    """Forget the finished layers from the first on that was made by another recipe, or refuse to.

    Raises:
        OutputError: a layer differs and the job does not amend.
    """
    for shard in job.plan.shards:
        unit = journal.finished.get(shard.unit)
        if unit is None:
            continue
        keys = ("name", "bits", "group_size", "symmetric", "method")
        found = {tuple(record[key] for key in keys) for record in unit.record["linears"]}
        wanted = {
            (x.name, x.scheme.bits, x.scheme.group_size, x.scheme.symmetric, job.method_of(x))
            for x in job.plan.quantized
            if x.unit == shard.unit and x.scheme is not None
        }
        if found != wanted:
            if not job.amend:
                name = min(found ^ wanted)[0]
                raise OutputError(
                    f"{job.out} holds a run with another recipe ({name} differs); repeat that one to continue it, "
                    "start over with --fresh, or choose another --out"
                )
            journal.drop_from(shard.unit)
            return


@dataclass(frozen=True)
class _Streams:
    """What travels through the layers, as far as the job has it: the evaluation samples on both models; the calibration
    samples, and the first of them on the original, beside, where their drift from it is made up for.
    """

    original: Stream | None
    quantized: Stream | None
    calibration: Stream | None
    beside: Stream | None


def _run(job: Job, sites: tuple[Site, ...], journal: Journal, progress: Progress) -> Outcome:
    model, plan = job.model, job.plan
    move_buffers(model.model, job.device)
    tokens = sum(found.input_ids.numel() for found in _streamed(job, job.beside))
    beside = _own(job, job.beside)  # of all samples: the job has only its own from here on
    job = replace(job, calibration=_own(job, job.calibration), evaluation=_own(job, job.evaluation))
    gram_samples = job.calibration.samples if job.calibration else 0
    job = replace(job, calibration=prepare(job, journal, progress))
    beside = job.calibration if job.options.tune else beside
    shards = {shard.unit: shard for shard in plan.shards}
    reused = len(shards.keys() & journal.finished.keys())
    _copy_outside(job, journal, shards["embeddings"])
    for name in model.outside():  # what cannot be stored is told now, not after the last layer
        to_stored(name, read_outside(model, [name])[name])
    streams = _open_streams(job, beside)
    places = {"calibration": streams.calibration, "evaluation": streams.original}
    progress.start(len(model.layers), tokens, {name: stream.place for name, stream in places.items() if stream})
    _embed_streams(job, streams, shards["embeddings"], gram_samples)
    layer_errors = _through_layers(job, sites, journal, progress, streams, gram_samples)

    if plan.head is not None and plan.head.scheme is not None and "head" not in journal.finished:
        progress.ending("quantize lm_head")
        _quantize_head(job, journal, shards["head"], plan.head, streams.calibration, streams.beside, gram_samples)
    elif "head" in shards:
        _copy_outside(job, journal, shards["head"])
    measured = None
    if job.evaluation and streams.original and streams.quantized:
        progress.ending("compare the logits")
        measured = _compare(job, streams.original, streams.quantized, shards) | {"layer_errors": layer_errors}
    units = tuple(unit for unit in journal.finished.values() if unit.unit in shards)
    peaks = job.ranks.gather(torch.tensor([[peak_rss_bytes(), peak_device_bytes(job.device)]])).tolist()
    most = tuple((rss, device) for rss, device in peaks)
    return Outcome(units, measured, _fallbacks(job, journal, streams), most, reused)


def _through_layers(
    job: Job, sites: tuple[Site, ...], journal: Journal, progress: Progress, streams: _Streams, gram_samples: int
) -> list[dict[str, Any]]:
    """Quantize all layers, or take those that are finished, and bring the streams behind the last one.

    gram_samples: of the calibration samples, how many Gram matrices are made of
    -> the relative error of each layer's output, where both models are evaluated
    """
    model, plan = job.model, job.plan
    original, quantized = streams.original, streams.quantized
    calibration, beside = streams.calibration, streams.beside
    shards = {shard.unit: shard for shard in plan.shards}
    finished = set(journal.finished)  # when the run began
    waiting = [linear.layer for linear in plan.quantized if linear.unit not in finished]
    layer_errors = []
    with read_ahead(_layer_reader(job), len(model.layers)) as sources, writer() as writing:
        for index in range(len(model.layers)):
            progress.layer(index)
            progress.stage("read")
            source = sources.take()
            weights = _loaded(job, source)
            assign(model.layers[index], weights)
            if original:
                progress.stage("run the original")
                advance(model, index, original)
            observed = None
            if calibration and job.inputs == "original":
                progress.stage("calibrate on the original")
                observed = observe(model, index, sites, calibration)

            shard = shards[f"layer.{index}"]
            more = any(
                layer > index or layer == OUTSIDE for layer in waiting
            )  # is still to be calibrated after this one
            known: Mapping[Shortcut, Known] = {}
            if shard.unit in finished:
                if beside and more:
                    progress.stage("run the original")
                    advance(model, index, beside, exact=False)
                stored, records = _read_shard(job, shard), journal.finished[shard.unit].record["linears"]
            else:
                seen = None
                if calibration and job.inputs == "quantized":
                    seen = Passage(model, index, calibration, gram_samples, _shortcuts(job, index, calibration, sites))
                result = _quantize(job, index, sites, source, weights, seen, beside, observed, progress, more=more)
                progress.stage("write")
                stored, records = _pack_layer(job, index, shard, result, source), result.records
                if job.ranks.first:
                    writing.submit(partial(_write_shard, job, journal, shard, copied(stored), records))
                known = seen.known if seen else {}
                del result, seen
            del source, weights, observed

            assign(model.layers[index], _loaded(job, _unpack_layer(job, index, stored)))
            del stored
            progress.stage("run the quantized")
            if quantized:
                advance(model, index, quantized)
            if calibration and more and job.inputs == "quantized":
                advance(model, index, calibration, known=known, exact=False)
            del known
            drop(model.layers[index])
            return_freed_memory()
            if original and quantized:
                layer_errors.append({"layer": index, "relative_error": relative_error(original, quantized, job.ranks)})
            reused = shard.unit in finished
            progress.finished(index, max((record["loss"] for record in records), default=0.0), reused)
    return layer_errors


def _quantize(
    job: Job,
    index: int,
    sites: tuple[Site, ...],
    source: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    seen: Passage | None,
    beside: Stream | None,
    observed: Sequence[SiteStats] | None,
    progress: Progress,
    *,
    more: bool,
) -> LayerResult:
    """Quantize the layer, with the original's samples beside those that calibrate it, and bring them behind it.

    source: the layer as stored; weights: as it runs; seen: the samples that calibrate it; more: whether anything after
    it is calibrated too
    """
    leaves = more or job.options.tune  # tuning aims at what the original's layer returns
    followed = None
    if seen and beside:
        samples = min(seen.samples, len(beside.states))
        followed = replace(seen, stream=beside, samples=samples, weights=weights, known={}, leaves=leaves)
    result = quantize_layer(job, index, sites, source, seen, followed, observed, progress)
    if beside and leaves:
        progress.stage("run the original")
        assign(job.model.layers[index], weights)
        advance(job.model, index, beside, first=followed.left if followed else 0, exact=False)
    if job.options.tune and seen and beside:
        progress.stage("tune")
        tune_layer(job, index, result, seen.stream, beside)
    return result


def _fallbacks(job: Job, journal: Journal, streams: _Streams) -> tuple[str, ...]:
    fallbacks = [f"tensor {name} has no place in the architecture and was left out" for name in job.model.ignored]
    if any(stream and stream.place == "file" for stream in (streams.calibration, streams.original)):
        fallbacks.append("hidden states did not fit in memory and were mapped from a file")
    raised = [r for unit in journal.finished.values() for r in unit.record["linears"] if "damp_raised_to" in r]
    fallbacks += [f"{r['name']}: damping raised to {r['damp_raised_to']:g} to factorise its inputs" for r in raised]
    tuned = [r for unit in journal.finished.values() for r in unit.record["linears"] if "tuning" in r]
    if left := [r for r in tuned if not r["tuning"]["kept"]]:
        fallbacks.append(
            f"--quality best: {len(left)} of {len(tuned)} linears were no better for tuning, by the samples kept back "
            "to judge, and stayed as they were; more --samples help"
        )
    return tuple(fallbacks)


# ---------------------------------------------------------------- tensors in and out


def _loaded(job: Job, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return loaded(tensors, job.device, job.dtype)


def _written(job: Job, shard: ShardPlan, names: list[str]) -> dict[str, Tensor]:
    """The named tensors as the output stores them; those of shards not written yet as they will be."""
    written = open_file(job.out / shard.file)
    stored = {name: written.read(name) for name in names if name in written.entries}
    rest = read_outside(job.model, [name for name in names if name not in stored])
    return stored | {name: to_stored(name, tensor) for name, tensor in rest.items()}


def _copy_outside(job: Job, journal: Journal, shard: ShardPlan) -> None:
    if shard.unit not in journal.finished and job.ranks.first:
        tensors = {name: to_stored(name, tensor) for name, tensor in read_outside(job.model, shard.tensors).items()}
        sha256 = write_shard(job.out / shard.file, tensors)
        journal.append(Unit(shard.unit, shard.file, sha256, {"linears": []}))
    job.ranks.wait()  # the others read it


def _quantize_head(
    job: Job,
    journal: Journal,
    shard: ShardPlan,
    head: LinearPlan,
    calibration: Stream | None,
    beside: Stream | None,
    samples: int,
) -> None:
    """Quantize the head from streams that have left the last layer, and write it with what else comes after those."""
    assert head.scheme is not None
    stats = None
    if calibration is not None and METHODS[job.method_of(head)].calibrates:
        stats = head_stats(job.model, calibration, beside, job.device, job.dtype, samples, job.ranks)
    weight = f"{head.name}.weight"
    source = read_outside(job.model, [*(name for name in shard.tensors if name in job.model.outside()), weight])
    whole = source.pop(weight).to(job.device)
    rounded, record = quantize_head(whole, head.scheme, job.options, stats, job.plan.format, job.ranks)
    tensors = {name: to_stored(name, tensor) for name, tensor in source.items()}
    tensors |= {f"{head.name}.{key}": tensor for key, tensor in job.plan.format.pack(rounded).items()}
    _require_planned(shard, tensors)
    outcome = SiteResult({head.local: rounded}, None, {head.local: record})
    if job.ranks.first:
        _write_shard(job, journal, shard, copied(tensors), records_of(job, outcome, {head.local: head}))
    job.ranks.wait()  # the others read it


def _layer_reader(job: Job) -> Callable[[int], dict[str, Tensor]]:
    """Reads a layer as stored (names local to it).

    For a GPU into pinned memory, which it copies from fastest: in turn into two places, as one layer is read while the
    one before it is in use. What outlives that must be a copy (`to_stored` makes one).
    """
    if job.device.type != "cuda":
        return partial(read_layer, job.model)
    rooms = [torch.empty(layer_room(job.model), dtype=torch.uint8) for _ in range(2)]
    for room in rooms:
        pin(room)
    return lambda index: read_layer(job.model, index, rooms[index % 2])


def _pack_layer(
    job: Job, index: int, shard: ShardPlan, result: LayerResult, source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the layer's shard by full name; packed ones are where they were computed."""
    prefix = job.model.layer_name(index)
    packed_weights = {f"{name}.weight" for name in result.quantized}
    kept = {name: result.changed.get(name, tensor) for name, tensor in source.items() if name not in packed_weights}
    tensors = {f"{prefix}.{name}": to_stored(f"{prefix}.{name}", tensor) for name, tensor in kept.items()}
    for name, quantized in result.quantized.items():
        packed = job.plan.format.pack(quantized)
        tensors |= {f"{prefix}.{name}.{key}": tensor for key, tensor in packed.items()}
    _require_planned(shard, tensors)
    return tensors


def _require_planned(shard: ShardPlan, tensors: Mapping[str, Tensor]) -> None:
    planned = {name: (spec.dtype, spec.shape) for name, spec in shard.tensors.items()}
    found = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if planned != found:
        raise OutputError(f"{shard.file}: what was computed is not what was planned: {set(planned) ^ set(found)}")


def _write_shard(
    job: Job,
    journal: Journal,
    shard: ShardPlan,
    tensors: Callable[[], Mapping[str, Tensor]],
    records: list[dict[str, Any]],
) -> None:
    sha256 = write_shard(job.out / shard.file, tensors())
    journal.append(Unit(shard.unit, shard.file, sha256, {"linears": records}))


def _read_shard(job: Job, shard: ShardPlan) -> dict[str, Tensor]:
    stored = open_file(job.out / shard.file)
    return stored.read_many(stored.entries, job.device)


def _unpack_layer(job: Job, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters as the tensors of its shard stand for them (names local to the layer)."""
    prefix = f"{job.model.layer_name(index)}."
    tensors = dequantized(stored, job.plan.layer(index).values(), job.plan.format)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- streams


def _open_streams(job: Job, beside: TokenSet | None) -> _Streams:
    place = job.place or _place(job, beside)

    def opened(tokens: TokenSet | None, name: str) -> Stream | None:
        if tokens is None:
            return None
        spill = job.out / f".{name}-states-{job.ranks.rank}.tmp"
        return open_states(job.model, tokens, job.dtype, job.device, spill, place, job.batch)

    return _Streams(
        original=opened(job.evaluation, "original"),
        quantized=opened(job.evaluation, "quantized"),
        calibration=opened(job.calibration, "calibration"),
        beside=opened(beside, "beside"),
    )


def _embed_streams(job: Job, streams: _Streams, embeddings: ShardPlan, gram_samples: int) -> None:
    """Fill the streams: those on the original by its embedding, those on the quantized by the one that is stored."""
    model = job.model
    with outside_loaded(model, _loaded(job, read_outside(model, embedding_names(model)))):
        _embed(job, job.evaluation, streams.original)
        _embed(job, job.calibration, streams.beside)
        if job.inputs == "original":
            _embed(job, job.calibration, streams.calibration)
        learn_sizes(job, streams.calibration, gram_samples)
    with outside_loaded(model, _loaded(job, _written(job, embeddings, embedding_names(model)))):
        _embed(job, job.evaluation, streams.quantized)
        if job.inputs == "quantized":
            _embed(job, job.calibration, streams.calibration)


def _place(job: Job, beside: TokenSet | None) -> str:
    """Where all the streams go: decided once for their sum, as memory that is not touched yet still counts as free."""
    tokens = sum(found.input_ids.numel() for found in _streamed(job, beside))
    return choose_place(tokens * job.model.config.hidden_size * job.dtype.itemsize, job.device)


def _streamed(job: Job, beside: TokenSet | None) -> list[TokenSet]:
    """The token set of each stream."""
    sets = [job.evaluation, job.evaluation, job.calibration, beside]
    return [tokens for tokens in sets if tokens is not None]


def _own(job: Job, tokens: TokenSet | None) -> TokenSet | None:
    """The samples of this rank."""
    return tokens and replace(tokens, input_ids=tokens.input_ids[job.ranks.own(tokens.samples)])


def _shortcuts(job: Job, index: int, calibration: Stream, sites: Sequence[Site]) -> tuple[Shortcut, ...]:
    """What need not run again for every site. Tuning moves all weights and runs all samples: nothing is kept for it."""
    if job.options.tune or not job.kept_width:
        return ()
    return shortcuts_of(job.model, index, calibration, sites, job.kept_width)


def _embed(job: Job, tokens: TokenSet | None, stream: Stream | None) -> None:
    if tokens is not None and stream is not None:
        embed_tokens(job.model, tokens, stream, job.device)


def _compare(job: Job, original: Stream, quantized: Stream, shards: Mapping[str, ShardPlan]) -> dict[str, Any]:
    assert job.evaluation is not None
    source = _loaded(job, read_outside(job.model, ending_names(job.model)))
    heads = [linear for linear in job.plan.quantized if linear.unit == "head"]

    def stored() -> Iterator[tuple[str, Tensor]]:
        for unit in ("embeddings", "head"):
            if unit in shards:
                file = open_file(job.out / shards[unit].file)
                packed = heads if unit == "head" else []
                tensors = dequantized(file.read_many(file.entries), packed, job.plan.format)
                yield from ((name, tensor) for name, tensor in tensors.items() if name in source)

    return compare(job.model, job.evaluation, original, quantized, source, stored(), job.device, job.ranks)
