# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves beside its shards: quantkit.json, the report, the card, and for llama.cpp the .gguf."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.tokens import notes_of, record_of
from quantkit.checkpoint.journal import Unit
from quantkit.errors import OutputError
from quantkit.formats.gguf import type_of
from quantkit.gguf.export import NOTES, Exported, export, open_source, planned_source
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.pipeline.job import Job
from quantkit.pipeline.run import Outcome
from quantkit.plan import Plan, resolved
from quantkit.recipe import shipped
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
from quantkit.verdict import Limits, verification_block


def document_of(
    request: Request,
    job: Job,
    outcome: Outcome,
    scheme: Scheme,
    directory: Path,
    memory: dict[str, Any],
    limits: Limits,
) -> dict[str, Any]:
    plan = job.plan
    return {
        "quantkit_version": __version__,
        "command": request.command,
        "model": request.model,
        "base_model": {"id": hub_id(request.model), "license": _license(request, directory)},
        "method": request.method,
        "format": plan.format.name,
        "scheme": {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric},
        "options": job.chosen_options() | {"seed": request.seed, "inputs": request.inputs},
        "recipe": resolved(plan, request.method),
        "calibration": record_of(job.calibration),
        "layers": [record for unit in outcome.units for record in unit.record["linears"]],
        "bits_per_weight": plan.bits_per_weight,
        "total_bytes": plan.file_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "peak_rss_bytes": max(peak_rss_bytes(), *(rss for rss, _ in outcome.peaks)),
        "peak_device_bytes": max(device for _, device in outcome.peaks),
        "processes": len(outcome.peaks),
        "device": str(job.runtime.device),
        "torch_dtype": outcome.served,
        "versions": versions(),
        "fallbacks": [
            *outcome.fallbacks,
            *notes_of(job.calibration, job.evaluation),
            *_beyond(outcome, request.ram),
        ],
        "engines": memory["engines"],
        "verification": _verification(job, outcome, memory, limits),
    }


def write_folder(
    job: Job, outcome: Outcome, directory: Path, result: dict[str, Any], outside: str = "f16"
) -> dict[str, Any]:
    """Write what engines and people read beside the shards; outside: see `gguf.export`."""
    out, plan = job.runtime.folder, job.plan
    if plan.temporary_shards:
        return _write_gguf_folder(job, directory, result, outside)
    files = {unit.file: unit.sha256 for unit in outcome.units}
    weight_map = {name: shard.file for shard in plan.shards for name in shard.tensors}
    config = quantized_config(directory, plan.quantization_config, outcome.served)
    files |= write_beside(out, directory, weight_map, plan.tensor_bytes, config, plan.format)
    if plan.format.block_bytes is not None:
        exported = export(open_source(out), out / f"{out.resolve().name}.gguf", name=label_of(result["model"]))
        files[exported.path.name] = exported.sha256
        result |= _exported_fields(plan, exported)
    result["files"] = file_records(out, files)
    if result["verification"] is None:
        result["verification"] = _still_valid(out, result["files"])
    write_result(out, result)
    return result


def _write_gguf_folder(job: Job, directory: Path, result: dict[str, Any], outside: str) -> dict[str, Any]:
    """The folder of a run whose shards are no checkpoint: the .gguf and what people read; then the shards go."""
    out = job.runtime.folder
    name = label_of(result["model"])
    path = out / f"{name}-{result_type(job.plan).upper()}.gguf"
    exported = export(planned_source(job.runtime.model, job.plan, out), path, outside=outside, name=name)
    result |= _exported_fields(job.plan, exported)
    result["gguf"]["embeddings"] = outside
    result["files"] = file_records(out, copy_companions(directory, out, NOTES) | {path.name: exported.sha256})
    write_result(out, result)
    remove_shards(job.plan, out)
    return result


def _exported_fields(plan: Plan, exported: Exported) -> dict[str, Any]:
    """What quantkit.json says of a .gguf: its bytes are what llama.cpp loads."""
    return {
        "total_bytes": exported.nbytes,
        "tensor_bytes": plan.beside_bytes,
        "gguf": {
            "file": exported.path.name,
            "bytes": exported.nbytes,
            "types": sorted(set(exported.types.values())),
            "equal": exported.equal,
        },
    }


def result_type(plan: Plan) -> str:
    """The type that most linears of a .gguf have."""
    types = [type_of(linear.scheme) for linear in plan.quantized if linear.scheme is not None]
    return max(sorted(set(types)), key=types.count)


def remove_shards(plan: Plan, out: Path) -> None:
    """Remove shards that a .gguf was made of."""
    for shard in plan.shards:
        (out / shard.file).unlink(missing_ok=True)


def file_made(plan: Plan, out: Path, recorded: Mapping[str, Any] | None, outside: str) -> bool:
    """Whether the one file that the shards were for is there as quantkit.json says; the shards need not be."""
    said = (recorded or {}).get("gguf") or {}
    made = said.get("file")
    hashes = {entry["name"]: entry["sha256"] for entry in (recorded or {}).get("files") or []}
    if (
        not plan.temporary_shards
        or not isinstance(made, str)
        or made not in hashes
        or said.get("embeddings") != outside
    ):
        return False
    return (out / made).is_file() and sha256_of(out / made) == hashes[made]


def _still_valid(out: Path, files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The verification of an earlier pass over the same run, if it was of these very files."""
    try:
        recorded = read_result(out)
    except OutputError:  # none, or a damaged one, which is about to be replaced
        return None
    verification: dict[str, Any] | None = recorded["verification"]
    return verification if recorded.get("files") == files else None


def _verification(job: Job, outcome: Outcome, memory: dict[str, Any], limits: Limits) -> dict[str, Any] | None:
    if outcome.measured is None:
        return None
    return verification_block(outcome.measured, record_of(job.evaluation), limits, memory)


def _beyond(outcome: Outcome, ram: int | None) -> list[str]:
    peak = max(rss for rss, _ in outcome.peaks)
    return [f"RAM reached {format_bytes(peak)}, beyond --ram {format_bytes(ram)}"] if ram and peak > ram else []


def _license(request: Request, directory: Path) -> str | None:
    """From the recipe, or from the front matter of the model's own card."""
    known = shipped().get(request.model)
    if known and known.license:
        return known.license
    card = directory / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return found[0] or None if found else None


def cost_of(result: Mapping[str, Any], seconds: float, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Time and memory; of a finished run that is only measured again, with those of the run."""
    if before is None:
        return {"seconds": seconds}
    peaks = {key: max(result[key], before.get(key) or 0) for key in ("peak_rss_bytes", "peak_device_bytes")}
    return {"seconds": seconds + (before.get("seconds") or 0)} | peaks


def continued_note(outcome: Outcome) -> list[str]:
    if not outcome.reused:
        return []
    return [f"continued: {outcome.reused} of {len(outcome.units)} files were there; time and memory are of this start"]


def recorded_in(out: Path) -> dict[str, Any] | None:
    """quantkit.json of a finished run, if there is a sound one."""
    try:
        return read_result(out)
    except OutputError:
        return None


def finished_before(
    job: Job, units: Sequence[Unit], memory: Mapping[str, Any], limits: Limits, recorded: Mapping[str, Any]
) -> bool:
    """Whether quantkit.json is that of this very run, brought to its end, with all that it is asked for."""
    files = {entry["name"]: entry["sha256"] for entry in recorded.get("files") or []}
    found = {} if job.plan.temporary_shards else {unit.file: unit.sha256 for unit in units}  # looked at just now
    if not all((job.runtime.folder / name).is_file() for name in (*files, "report.html", "README.md")):
        return False
    if files != found | {name: sha256_of(job.runtime.folder / name) for name in files.keys() - found.keys()}:
        return False
    if job.evaluation is None:
        return True
    said = recorded["verification"] or {}
    judged = said.get("fit") or {}
    return (
        (said.get("eval") or {}).get("sha256") == job.evaluation.sha256
        and said.get("limits") == vars(limits)
        and all(judged.get(key) == memory[key] for key in ("budget_bytes", "context", "kv", "total_bytes"))
    )
