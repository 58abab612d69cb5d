# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves beside its shards: quantkit.json, the report, the card, and for llama.cpp the .gguf."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit import __version__
from quantkit.calibration.tokens import notes_of, record_of
from quantkit.checkpoint.journal import Unit
from quantkit.errors import OutputError
from quantkit.formats.gguf import type_of
from quantkit.gguf.export import NOTES, Exported, export, open_source, planned_source
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.pipeline.job import Job
from quantkit.pipeline.memory import Layout
from quantkit.pipeline.run import Outcome
from quantkit.plan import Plan, resolved
from quantkit.recipe import shipped
from quantkit.records import BaseModelFacts, Fit, GgufFile, Limits, Linear, Numbers, Result, Verification
from quantkit.results.document import read_result
from quantkit.results.folder import (
    copy_companions,
    file_records,
    quantized_config,
    sha256_of,
    write_beside,
    write_result,
)
from quantkit.scheme import Scheme
from quantkit.settings.defaults import hub_id, label_of
from quantkit.settings.request import Request
from quantkit.units import format_bytes
from quantkit.verdict import verification_of


@dataclass(frozen=True)
class Run:
    """A run as its document describes it.

    memory: what `fit` says of the result; notes: what the user was told before it began; before: quantkit.json that was
    there already; began: by `time.monotonic`
    """

    request: Request
    job: Job
    scheme: Scheme
    limits: Limits
    memory: Fit
    layout: Layout
    notes: Sequence[str]
    before: Result | None
    began: float


def recorded_in(out: Path) -> Result | None:
    """quantkit.json of a finished run, if there is a sound one."""
    try:
        return read_result(out)
    except OutputError:
        return None


def is_done(run: Run, units: Sequence[Unit]) -> bool:
    """Whether quantkit.json is that of this very run, brought to its end, with all that it is asked for.

    units: all of the run, whose files have just been looked at
    """
    before, job = run.before, run.job
    if before is None:
        return False
    files = {file.name: file.sha256 for file in before.files}
    found = {} if job.plan.temporary_shards else {unit.file: unit.sha256 for unit in units}
    if not all((job.runtime.folder / name).is_file() for name in (*files, "report.html", "README.md")):
        return False
    if files != found | {name: sha256_of(job.runtime.folder / name) for name in files.keys() - found.keys()}:
        return False
    return job.evaluation is None or _is_judged(run, job.evaluation.sha256, before.verification)


def _is_judged(run: Run, evaluation: str, measured: Verification | None) -> bool:
    """Whether a verification is on these tokens (their sha256), and by the limits and for the memory of this run."""
    if measured is None or measured.eval is None or measured.fit is None:
        return False
    same = all(
        getattr(measured.fit, key) == getattr(run.memory, key)
        for key in ("budget_bytes", "context", "kv", "total_bytes")
    )
    return same and measured.eval.sha256 == evaluation and measured.limits == run.limits


def finish(run: Run, outcome: Outcome) -> Result:
    """Write what engines and people read beside the shards, and return the document."""
    job, plan, result = run.job, run.job.plan, _result(run, outcome)
    if plan.temporary_shards:
        return _write_gguf_folder(run, result)
    out, directory = job.runtime.folder, job.runtime.model.directory
    files = {unit.file: unit.sha256 for unit in outcome.units}
    weight_map = {name: shard.file for shard in plan.shards for name in shard.tensors}
    config = quantized_config(directory, plan.quantization_config, outcome.served)
    files |= write_beside(out, directory, weight_map, plan.tensor_bytes, config, plan.format)
    if plan.format.block_bytes is not None:
        exported = export(open_source(out), out / f"{out.resolve().name}.gguf", name=label_of(result.model))
        files[exported.path.name] = exported.sha256
        result = _with_gguf(result, plan, exported)
    result = result.having(files=file_records(out, files))
    earlier = recorded_in(out)
    if result.verification is None and earlier is not None and earlier.files == result.files:
        result = result.having(verification=earlier.verification)  # of a pass over these very files
    write_result(out, result)
    return result


def _write_gguf_folder(run: Run, result: Result) -> Result:
    """The folder of a run whose shards are no checkpoint: the .gguf and what people read; then the shards go."""
    plan, out, model = run.job.plan, run.job.runtime.folder, run.job.runtime.model
    name, outside = label_of(result.model), run.request.outside
    path = out / f"{name}-{result_type(plan).upper()}.gguf"
    exported = export(planned_source(model, plan, out), path, outside=outside, name=name)
    files = copy_companions(model.directory, out, NOTES) | {path.name: exported.sha256}
    result = _with_gguf(result, plan, exported, outside).having(files=file_records(out, files))
    write_result(out, result)
    remove_shards(plan, out)
    return result


def _with_gguf(result: Result, plan: Plan, exported: Exported, outside: str | None = None) -> Result:
    """With what there is to say of a .gguf: its bytes are what llama.cpp loads; outside: see `gguf.export`."""
    file = GgufFile(
        file=exported.path.name,
        bytes=exported.nbytes,
        types=sorted(set(exported.types.values())),
        equal=exported.equal,
        **({"embeddings": outside} if outside else {}),
    )
    return result.having(gguf=file, total_bytes=exported.nbytes, tensor_bytes=plan.beside_bytes)


def result_type(plan: Plan) -> str:
    """The type that most linears of a .gguf have."""
    types = [type_of(linear.scheme) for linear in plan.quantized if linear.scheme is not None]
    return max(sorted(set(types)), key=types.count)


def remove_shards(plan: Plan, out: Path) -> None:
    """Remove shards that a .gguf was made of."""
    for shard in plan.shards:
        (out / shard.file).unlink(missing_ok=True)


def file_made(run: Run) -> bool:
    """Whether the one file that the shards were for is there as quantkit.json says; the shards need not be."""
    before, out = run.before, run.job.runtime.folder
    if not run.job.plan.temporary_shards or before is None or before.gguf is None:
        return False
    hashes = {file.name: file.sha256 for file in before.files}
    name = before.gguf.file
    if name not in hashes or before.gguf.embeddings != run.request.outside:
        return False
    return (out / name).is_file() and sha256_of(out / name) == hashes[name]


def _result(run: Run, outcome: Outcome) -> Result:
    request, job, plan = run.request, run.job, run.job.plan
    directory = job.runtime.model.directory
    again = run.before if outcome.reused == len(outcome.units) else None  # all was there, and is only measured
    continued = [] if again or not outcome.reused else [_continued(outcome)]
    peaks = [max(column) for column in zip((peak_rss_bytes(), 0), *outcome.peaks, strict=True)]
    seconds = time.monotonic() - run.began
    if again is not None:
        peaks = [max(peaks[0], again.peak_rss_bytes or 0), max(peaks[1], again.peak_device_bytes or 0)]
        seconds += again.seconds or 0
    return Result(
        quantkit_version=__version__,
        command=request.command,
        model=request.model,
        base_model=BaseModelFacts(id=hub_id(request.model), license=_license(request.model, directory)),
        method=request.method,
        format=plan.format.name,
        scheme=Numbers(**Numbers.fields_of(run.scheme)),
        options=job.chosen_options() | {"seed": request.seed, "inputs": request.inputs},
        recipe=resolved(plan, request.method),
        calibration=record_of(job.calibration),
        layers=[Linear.model_validate(row) for unit in outcome.units for row in unit.record["linears"]],
        bits_per_weight=plan.bits_per_weight,
        total_bytes=plan.file_bytes,
        tensor_bytes=plan.tensor_bytes,
        seconds=seconds,
        peak_rss_bytes=peaks[0],
        peak_device_bytes=peaks[1],
        processes=len(outcome.peaks),
        device=str(job.runtime.device),
        torch_dtype=outcome.served,
        memory=run.layout.record(),
        versions=versions(),
        fallbacks=[
            *outcome.fallbacks,
            *run.notes,
            *continued,
            *notes_of(job.calibration, job.evaluation),
            *_beyond(outcome, request.ram),
        ],
        engines=run.memory.engines,
        verification=_verification(run, outcome),
    )


def _verification(run: Run, outcome: Outcome) -> Verification | None:
    if outcome.measured is None:
        return None
    evaluation = record_of(run.job.evaluation)
    return verification_of(outcome.measured, evaluation, run.limits, run.memory)


def _continued(outcome: Outcome) -> str:
    return f"continued: {outcome.reused} of {len(outcome.units)} files were there; time and memory are of this start"


def _beyond(outcome: Outcome, ram: int | None) -> list[str]:
    peak = max(rss for rss, _ in outcome.peaks)
    return [f"RAM reached {format_bytes(peak)}, beyond --ram {format_bytes(ram)}"] if ram and peak > ram else []


def _license(model: str, directory: Path) -> str | None:
    """From the recipe, or from the front matter of the model's own card."""
    known = shipped().get(model)
    if known and known.license:
        return known.license
    card = directory / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return found[0] or None if found else None
