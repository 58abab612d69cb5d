# SPDX-License-Identifier: Apache-2.0
"""The loop: one decoder layer at a time is read, calibrated, quantized, written, read back, and run.

Token streams travel through the layers beside it: the calibration samples and the evaluation samples on the quantized
model, and the evaluation samples once more on the original one. The quantized streams run on weights unpacked from the
very tensors that the shard holds, so every run tests the bytes that it leaves, later layers are calibrated on what they
will really see, and at the end both models have been measured in the same pass over the original. The next layer is
read, and the last one's shard hashed and written, while a layer is computed.

A finished layer is a finished shard, hashed and entered in the journal. A run that starts again takes finished shards
from the disk and only runs them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import __version__
from quantkit.activations import TOKENS_A_STEP, Stream, choose_place, regrouped, samples_per_sum
from quantkit.background import read_ahead, writer
from quantkit.calibration import TokenSet
from quantkit.checkpoint.journal import Journal, Unit, open_journal
from quantkit.checkpoint.reader import fingerprint, open_file
from quantkit.checkpoint.writer import require_disk, write_shard
from quantkit.dtypes import dtype_name, torch_dtype
from quantkit.errors import NumericsError, OutputError, SchemeError
from quantkit.evaluation import (
    Progress,
    advance,
    compare,
    embed_tokens,
    embedding_names,
    ending_names,
    loaded,
    observe,
    open_states,
    relative_error,
    run_dtype,
)
from quantkit.machine import device_name, return_freed_memory
from quantkit.model.families import Site
from quantkit.model.sites import fold_channels, sites_of
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embed,
    move_buffers,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
    run_to,
)
from quantkit.plan import STORED, LinearPlan, Plan, ShardPlan
from quantkit.quantize.gptq import Factor
from quantkit.quantize.grid import to_float16
from quantkit.quantize.methods import METHODS, Options, SiteInput, SiteResult
from quantkit.quantize.tune import Loss, tune
from quantkit.resample import resample
from quantkit.scheme import QuantizedTensor, Scheme, dequantize
from quantkit.stats import SiteStats, collect, require_finite_stats
from quantkit.stored import dequantized

TUNING = "tuning-tokens"
TUNING_TOKENS = 2**18  # to tune on; what the calibration set lacks, the original model writes,
MOST_COPIES = 3  # as copies of it
JUDGES = 32  # one step in so many is kept back to judge the others
DISK_MARGIN = 64 * 2**20  # config, tokenizer, report and a journal beside the shards


@dataclass(frozen=True)
class Job:
    """Everything that determines a run.

    method: a name in METHODS, for the linears whose plan names no other; calibration: None when no method needs one;
    evaluation: None to leave out verification; device: where the layers run;
    place: where hidden states live ("device", "ram", "file"; None lets memory decide);
    batch: samples in a micro-batch (None: as many as are usual);
    inputs: what calibrates a layer: "quantized", what it will see after the layers before it, or "original";
    amend: whether finished layers of another recipe are made anew (from the first that differs), not refused.
    """

    model: StreamedModel
    plan: Plan
    method: str
    options: Options
    calibration: TokenSet | None
    evaluation: TokenSet | None
    out: Path
    device: torch.device
    place: str | None = None
    batch: int | None = None
    inputs: str = "quantized"
    amend: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and weights while running."""
        return run_dtype(self.model, self.device, f"{self.plan.linears[0].name}.weight")

    @property
    def follows_original(self) -> bool:
        """Whether the calibration samples travel through the original model too."""
        return self.calibration is not None and self.options.needs_original and self.inputs == "quantized"

    @property
    def tuning_copies(self) -> int:
        """How many rewritten copies of the calibration set tuning wants."""
        if self.calibration is None or not self.options.tune:
            return 0
        return min(MOST_COPIES, -(-TUNING_TOKENS // self.calibration.input_ids.numel()) - 1)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: everything that the bytes of the shards depend on.

        Mixed schemes stand in the records of the layers instead: see `_compare_recipes`.
        """
        schemes = {str(linear.scheme) for linear in self.plan.linears}
        return {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": device_name(self.device),
            "method": self.method,
            "format": self.plan.format.name,
            "scheme": schemes.pop() if len(schemes) == 1 and not self.amend else "by linear",
            "options": vars(self.options),
            "calibration": self.calibration.sha256 if self.calibration else None,
            "model": fingerprint(self.model.checkpoint),
        } | ({"inputs": self.inputs} if self.inputs != "quantized" else {})

    def method_of(self, linear: LinearPlan) -> str:
        """The method that chooses the integers of a linear."""
        return linear.method or self.method


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: one record per finished unit, in order, and the measurements (None without evaluation)."""

    units: tuple[Unit, ...]
    measured: dict[str, Any] | None
    fallbacks: tuple[str, ...]


@dataclass
class LayerResult:
    """A quantized layer: names local to it; `changed` holds in float32 what a fold changed and is not quantized;
    offsets: see `tune`.
    """

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    offsets: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def run(
    job: Job, progress: Progress, *, fresh: bool = False, finish: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Quantize a model into `job.out`; the checkpoint's shards and the journal are written, nothing else.

    finish: called at the end, while the folder is still locked, to write what belongs beside the shards.

    Raises:
        OutputError: the folder is busy, foreign, or of another run; the disk is too small.
        NumericsError: weights, activations or statistics that are not finite, with the layer's name.
    """
    missing = [shard.file_bytes for shard in job.plan.shards if not (job.out / shard.file).exists()]
    require_disk(job.out, sum(missing) + DISK_MARGIN)
    sites = sites_of(job.model)
    _require_one_method(job, sites)
    with open_journal(job.out, job.identity(), fresh=fresh) as journal:
        if TUNING in journal.finished and not journal.verify_unit(journal.finished[TUNING]):
            journal.drop_from(TUNING)
        _compare_recipes(job, journal)
        for shard in job.plan.shards:
            unit = journal.finished.get(shard.unit)
            if unit is not None and not journal.verify_unit(unit):
                journal.drop_from(shard.unit)
        outcome = _run(job, sites, journal, progress)
        finish(outcome)
        return outcome


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
        if unit is None or not shard.unit.startswith("layer."):
            continue
        keys = ("name", "bits", "group_size", "symmetric", "method")
        found = {tuple(record[key] for key in keys) for record in unit.record["linears"]}
        wanted = {
            (x.name, x.scheme.bits, x.scheme.group_size, x.scheme.symmetric, job.method_of(x))
            for x in job.plan.layer(int(shard.unit.removeprefix("layer."))).values()
            if x.scheme is not None
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


def _run(job: Job, sites: tuple[Site, ...], journal: Journal, progress: Progress) -> Outcome:
    model, plan = job.model, job.plan
    move_buffers(model.model, job.device)
    gram_samples = job.calibration.samples if job.calibration else 0
    job = replace(job, calibration=_tuning_tokens(job, journal, progress))
    shards = {shard.unit: shard for shard in plan.shards}
    _copy_outside(job, journal, shards["embeddings"])
    for name, tensor in read_outside(model).items():  # what cannot be stored is told now, not after the last layer
        to_stored(name, tensor)
    place = job.place or _place(job)
    original = _open(job, job.evaluation, "original", place)
    quantized = _open(job, job.evaluation, "quantized", place)
    calibration = _open(job, job.calibration, "calibration", place)
    wanted = _open(job, job.calibration if job.follows_original else None, "wanted", place)
    tokens = sum(
        stream.states.shape[0] * stream.states.shape[1]
        for stream in (original, quantized, calibration, wanted)
        if stream
    )
    streams = {"calibration": calibration, "evaluation": original}
    progress.start(len(model.layers), tokens, {name: stream.place for name, stream in streams.items() if stream})
    with outside_loaded(model, _loaded(job, read_outside(model, embedding_names(model)))):
        _embed(job, job.evaluation, original)
        _embed(job, job.calibration, wanted)
        if job.inputs == "original":
            _embed(job, job.calibration, calibration)
        _learn_steps(job)
    with outside_loaded(model, _loaded(job, _written(job, shards["embeddings"], embedding_names(model)))):
        _embed(job, job.evaluation, quantized)
        if job.inputs == "quantized":
            _embed(job, job.calibration, calibration)

    layer_errors = []
    finished = set(journal.finished)  # when the run began
    with read_ahead(lambda index: _read(job, index), len(model.layers)) as sources, writer() as writing:
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
            reused = shard.unit in finished
            unfinished = any(f"layer.{later}" not in finished for later in range(index + 1, len(model.layers)))
            if not reused:
                result = _quantize_layer(
                    job, index, sites, calibration, wanted, weights, gram_samples, observed, progress
                )
            if wanted and (unfinished or (job.options.tune and not reused)):
                progress.stage("run the original")
                assign(model.layers[index], weights)
                advance(model, index, wanted)
            if reused:
                stored, records = _read_shard(job, shard), journal.finished[shard.unit].record["linears"]
            else:
                if job.options.tune and calibration and wanted:
                    progress.stage("tune")
                    _tune_layer(job, index, result, calibration, wanted)
                progress.stage("write")
                stored, records = _pack_layer(job, index, shard, result, source), result.records
                writing.submit(partial(_write_layer, job, journal, shard, stored, records))
                del result
            del source, weights, observed
            assign(model.layers[index], _loaded(job, _unpack_layer(job, index, stored)))
            del stored
            progress.stage("run the quantized")
            for stream in (quantized, calibration if unfinished and job.inputs == "quantized" else None):
                if stream:
                    advance(model, index, stream)
            drop(model.layers[index])
            return_freed_memory()
            if original and quantized:
                layer_errors.append({"layer": index, "relative_error": relative_error(original, quantized)})
            progress.finished(index, max((record["loss"] for record in records), default=0.0), reused)

    if "head" in shards:
        _copy_outside(job, journal, shards["head"])
    measured = None
    if job.evaluation and original and quantized:
        progress.ending("compare the logits")
        measured = _compare(job, original, quantized, shards) | {"layer_errors": layer_errors}
    fallbacks = [f"tensor {name} has no place in the architecture and was left out" for name in model.ignored]
    if any(stream and stream.place == "file" for stream in (calibration, original)):
        fallbacks.append("hidden states did not fit in memory and were mapped from a file")
    raised = [r for unit in journal.finished.values() for r in unit.record["linears"] if "damp_raised_to" in r]
    fallbacks += [f"{r['name']}: damping raised to {r['damp_raised_to']:g} to factorise its inputs" for r in raised]
    units = tuple(unit for unit in journal.finished.values() if unit.unit in shards)
    return Outcome(units, measured, tuple(fallbacks))


# ---------------------------------------------------------------- tensors in and out


def _loaded(job: Job, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return loaded(tensors, job.device, job.dtype)


def _written(job: Job, shard: ShardPlan, names: list[str]) -> dict[str, Tensor]:
    """The named tensors as the output stores them; those of shards not written yet as they will be."""
    written = open_file(job.out / shard.file)
    stored = {name: written.read(name) for name in names if name in written.entries}
    rest = read_outside(job.model, [name for name in names if name not in stored])
    return stored | {name: to_stored(name, tensor) for name, tensor in rest.items()}


def to_stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, as the output stores it.

    Raises:
        NumericsError: a value beyond float16.
    """
    stored = tensor.to(torch_dtype(STORED))
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(f"{name}: largest value {float(tensor.abs().max()):.3g} is beyond float16 (65504)")
    return stored


def _copy_outside(job: Job, journal: Journal, shard: ShardPlan) -> None:
    if shard.unit not in journal.finished:
        tensors = {name: to_stored(name, tensor) for name, tensor in read_outside(job.model, shard.tensors).items()}
        sha256 = write_shard(job.out / shard.file, tensors)
        journal.append(Unit(shard.unit, shard.file, sha256, {"linears": []}))


def _read(job: Job, index: int) -> dict[str, Tensor]:
    """The layer as stored (names local to it); for a GPU in pinned memory, which it copies from fastest."""
    tensors = read_layer(job.model, index)
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if job.device.type == "cuda" else tensors


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
    planned = {name: (spec.dtype, spec.shape) for name, spec in shard.tensors.items()}
    found = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if planned != found:
        raise OutputError(f"{shard.file}: what was computed is not what was planned: {set(planned) ^ set(found)}")
    return tensors


def _write_layer(
    job: Job, journal: Journal, shard: ShardPlan, tensors: Mapping[str, Tensor], records: list[dict[str, Any]]
) -> None:
    sha256 = write_shard(job.out / shard.file, tensors)
    journal.append(Unit(shard.unit, shard.file, sha256, {"linears": records}))


def _read_shard(job: Job, shard: ShardPlan) -> dict[str, Tensor]:
    stored = open_file(job.out / shard.file)
    return stored.read_many(stored.entries, job.device)


def _unpack_layer(job: Job, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters as the tensors of its shard stand for them (names local to the layer)."""
    prefix = f"{job.model.layer_name(index)}."
    tensors = dequantized(stored, job.plan.layer(index).values(), job.plan.format)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def quantize_observed(
    job: Job,
    index: int,
    sites: tuple[Site, ...],
    observed: Sequence[SiteStats | None],
    factors: Sequence[Factor | None],
    source: Mapping[str, Tensor],
    progress: Progress,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Quantize a layer from what its sites read in the original, writing nothing.

    source: the layer's tensors as stored; it is materialised from them first. The statistics may be rescaled in place.
    Returns the layer's tensors as a written shard would stand for them (names local to the layer), and the records.
    """
    assign(job.model.layers[index], _loaded(job, source))
    result = _quantize_layer(job, index, sites, None, None, {}, 0, observed, progress, factors)
    kept = {name: to_stored(name, result.changed.get(name, tensor)) for name, tensor in source.items()}
    return kept | {f"{name}.weight": dequantize(q) for name, q in result.quantized.items()}, result.records


# ---------------------------------------------------------------- streams


def _place(job: Job) -> str:
    """Where all the streams go: decided once for their sum, as memory that is not touched yet still counts as free."""
    sets = [job.evaluation] * 2 + [job.calibration] * (2 if job.follows_original else 1)
    tokens = [t.input_ids.numel() for t in sets if t is not None]
    return choose_place(sum(tokens) * job.model.config.hidden_size * job.dtype.itemsize, job.device)


def _open(job: Job, tokens: TokenSet | None, name: str, place: str) -> Stream | None:
    if tokens is None:
        return None
    return open_states(job.model, tokens, job.dtype, job.device, job.out / f".{name}-states.tmp", place, job.batch)


def _embed(job: Job, tokens: TokenSet | None, stream: Stream | None) -> None:
    if tokens is not None and stream is not None:
        embed_tokens(job.model, tokens, stream, job.device)


def _compare(job: Job, original: Stream, quantized: Stream, shards: Mapping[str, ShardPlan]) -> dict[str, Any]:
    assert job.evaluation is not None
    source = _loaded(job, read_outside(job.model, ending_names(job.model)))
    files = [open_file(job.out / shards[unit].file) for unit in ("embeddings", "head") if unit in shards]
    stored = ((name, file.read(name)) for file in files for name in file.entries if name in source)
    return compare(job.model, job.evaluation, original, quantized, source, stored, job.device)


# ---------------------------------------------------------------- one layer


def _quantize_layer(
    job: Job,
    index: int,
    sites: tuple[Site, ...],
    calibration: Stream | None,
    wanted: Stream | None,
    weights: Mapping[str, Tensor],
    gram_samples: int,
    observed: Sequence[SiteStats | None] | None,
    progress: Progress,
    factors: Sequence[Factor | None] | None = None,
) -> LayerResult:
    """Quantize the materialised layer site by site; the inputs of a site come from the sites before it, quantized.

    wanted: the calibration samples as they enter this layer in the original model; weights: those
    of this layer in the original model
    observed, factors: the statistics of each site, and the factors of their Gram matrices, where known already
    """
    layer, linears = job.model.layers[index], job.plan.layer(index)
    result = LayerResult()
    for number, site in enumerate(sites):
        if all(linears[name].scheme is None for name in site.linears):
            continue
        method = job.method_of(linears[site.linears[0]])
        name = f"{job.model.layer_name(index)}.{site.linears[0]}"
        stats = None if observed is None else observed[number]
        if stats is None and calibration is not None and method != "rtn":
            progress.stage(f"calibrate {_kinds(site)}")
            stats = _collect(job, index, site, calibration, wanted, weights, gram_samples)
            require_finite_stats(stats, name)
        progress.stage(f"quantize {_kinds(site)}")
        channel = fold_channels(job.model, index, site)
        inputs = _site_input(job, layer, linears, site, stats, channel)
        if factors is not None:
            inputs = replace(inputs, factor=factors[number])
        try:
            outcome = METHODS[method](inputs, job.options)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        if outcome.scale is not None and channel is not None:
            schemes = {name: linears[name].scheme for name in site.linears}
            _fold(layer, site, outcome.scale, channel.to(job.device), schemes, result)
        result.quantized |= outcome.quantized
        result.offsets |= outcome.offsets
        _assign_float(layer, {f"{local}.weight": dequantize(q) for local, q in outcome.quantized.items()})
        result.records += _records(job, outcome, linears)
    return result


def _kinds(site: Site) -> str:
    return "/".join(name.rpartition(".")[2].removesuffix("_proj") for name in site.linears)


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _assign_float(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    dtype = next(iter(layer.parameters())).dtype
    assign(layer, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def _tuning_tokens(job: Job, journal: Journal, progress: Progress) -> TokenSet | None:
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


def _learn_steps(job: Job) -> None:
    """Let the model show what its layers are called with at the sizes of tuning's steps; inside `outside_loaded`."""
    if job.options.tune and job.calibration is not None:
        step = _samples_a_step(job.calibration.seqlen)
        for samples in {min(step, job.calibration.samples), job.calibration.samples % step} - {0}:
            embed(job.model, job.calibration.input_ids[:samples].to(job.device))


def _tune_layer(job: Job, index: int, result: LayerResult, calibration: Stream, wanted: Stream) -> None:
    """Tune the layer's codes and scales towards the original's outputs; `wanted` holds those already.

    Every sample is seen once, in an order of its own for each layer. The last ones only judge: a layer that they
    find no better stays as it was.
    """
    layer = job.model.layers[index]
    _assign_float(layer, result.changed)
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


def _site_input(
    job: Job,
    layer: nn.Module,
    linears: Mapping[str, LinearPlan],
    site: Site,
    stats: SiteStats | None,
    channel: Tensor | None,
) -> SiteInput:
    schemes = {name: linears[name].scheme for name in site.linears}
    present = [scheme for scheme in schemes.values() if scheme is not None]
    return SiteInput(
        weights={name: _weight(layer, name) for name in site.linears},
        schemes=schemes,
        stats=stats,
        channel=None if channel is None else channel.to(job.device),
        min_zero=max(job.plan.format.min_zero(scheme) for scheme in present),
    )


def _collect(
    job: Job,
    index: int,
    site: Site,
    calibration: Stream,
    wanted: Stream | None,
    weights: Mapping[str, Tensor],
    samples: int,
) -> SiteStats:
    layer = job.model.layers[index]
    in_features = _weight(layer, site.linears[0]).shape[1]
    so_far = dict(layer.named_parameters())

    def inputs(stream: Stream, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
        together = samples_per_sum(stream.states.shape[1])
        return regrouped(_inputs(job, index, site, stream, parameters, samples), together)

    originals = None if wanted is None else inputs(wanted, weights)
    stats = collect(inputs(calibration, so_far), in_features, job.device, originals)
    assign(layer, so_far)
    return stats


def _inputs(
    job: Job, index: int, site: Site, stream: Stream, parameters: Mapping[str, Tensor], samples: int
) -> Iterator[Tensor]:
    """What the site's linears read, one micro-batch [samples, seqlen, in_features] at a time, with these parameters."""
    for batch in stream.batches(samples):
        assign(job.model.layers[index], parameters)
        yield run_to(job.model, index, stream.states[batch].to(job.device), site.linears[0])


def _fold(
    layer: nn.Module,
    site: Site,
    scale: Tensor,
    channel: Tensor,
    schemes: Mapping[str, Scheme | None],
    result: LayerResult,
) -> None:
    """Divide the producer's outputs by scale [channels], and multiply the 16-bit linears of the site by it.

    A producer that is quantized already keeps its codes: its rows' scales are divided.
    """
    producer = site.producer
    assert producer is not None
    parameters = dict(layer.named_parameters())

    def exact(name: str) -> Tensor:
        return result.changed.get(name, parameters[name].float())

    changed = {f"{name}.weight": exact(f"{name}.weight") * scale[channel] for name in site.linears}
    if f"{producer}.bias" in parameters:
        changed[f"{producer}.bias"] = exact(f"{producer}.bias") / scale
    done = result.quantized.get(producer)
    if done is None:
        weight = exact(f"{producer}.weight")
        changed[f"{producer}.weight"] = weight / (scale if weight.dim() == 1 else scale.unsqueeze(1))
    else:
        scales = to_float16(done.scales.float() / scale.unsqueeze(1))
        result.quantized[producer] = replace(done, scales=scales)
        _assign_float(layer, {f"{producer}.weight": dequantize(result.quantized[producer])})
    to_be_quantized = {f"{name}.weight" for name in site.linears if schemes[name] is not None}
    result.changed |= {name: tensor for name, tensor in changed.items() if name not in to_be_quantized}
    _assign_float(layer, changed)


def _records(job: Job, outcome: SiteResult, linears: Mapping[str, LinearPlan]) -> list[dict[str, Any]]:
    records = []
    for local, quantized in outcome.quantized.items():
        linear = linears[local]
        specs = job.plan.format.specs(quantized.scheme, linear.out_features, linear.in_features)
        records.append(
            {
                "name": linear.name,
                "layer": linear.layer,
                "kind": local.rpartition(".")[2],
                "bits": quantized.scheme.bits,
                "group_size": quantized.scheme.group_size,
                "symmetric": quantized.scheme.symmetric,
                "method": job.method_of(linear),
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "bytes": sum(spec.nbytes for spec in specs.values()),
                **outcome.records[local],
            }
        )
    return records
