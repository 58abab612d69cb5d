# SPDX-License-Identifier: Apache-2.0
"""`quantkit convert SOURCE --to gguf`: a folder with one GGUF file, its measurements, report and card.

A quantized checkpoint keeps its integers (`gguf.export`). A 16-bit model is rounded straight into GGUF's blocks, with
calibration, by a run as any other (`commands.quantize`).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantkit import __version__
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.checkpoint.reader import fingerprint
from quantkit.checkpoint.writer import write_json
from quantkit.commands.quantize import quantize
from quantkit.commands.verify import measured_like, verify_files
from quantkit.errors import InputError, ModelError, QuantkitError
from quantkit.formats.gguf import TYPES
from quantkit.gguf.export import NOTES, export, open_source, types_of
from quantkit.gguf.file import open_gguf
from quantkit.gguf.reading import GGUFModel, open_gguf_model
from quantkit.hardware.machine import peak_device_bytes, peak_rss_bytes, versions
from quantkit.methods.table import Options
from quantkit.quantized import quantization_of, read_config, writer
from quantkit.results.document import RESULT
from quantkit.results.folder import (
    changed_files,
    copy_companions,
    file_records,
    require_another,
    result_of,
    sha256_of,
    write_result,
)
from quantkit.settings.defaults import hub_id, label_of
from quantkit.settings.request import Request

DEFAULT_TYPE = "q4_k"


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for. None: not said.

    type: of the linears; outside: of the embedding and the head; against: the 16-bit model to measure a quantized
    checkpoint with; nearest: round without error compensation; the rest as in `commands.quantize.Request`
    """

    source: str
    command: str
    type: str | None = None
    outside: str = "f16"
    out: Path | None = None
    requantize: bool = False
    nearest: bool = False
    against: str | None = None
    calib: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    evaluation: str | None = None
    eval_samples: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fresh: bool = False
    offline: bool = False
    verify: bool = True


def to_gguf(request: ExportRequest, console: Console) -> tuple[dict[str, Any], Path]:
    """Make the folder and return its result document (quantkit.json) and where it is.

    Raises:
        SchemeError: integers that the type cannot hold. QuantkitError: anything else that the user can mend.
    """
    if request.type is not None and request.type not in TYPES:
        raise InputError(f"--type: expected {', '.join(t for t in TYPES if t != 'f32')}, got {request.type!r}")
    folder = Path(request.source)
    if folder.is_dir() and _is_quantized(folder):
        return _keep_integers(request, folder, console)
    return _round(request, console)


def _is_quantized(folder: Path) -> bool:
    try:
        return bool(quantization_of(read_config(folder)))
    except ModelError:
        return False  # what is wrong with it is told by whoever opens it


# ---------------------------------------------------------------- integers as they are


def _keep_integers(request: ExportRequest, folder: Path, console: Console) -> tuple[dict[str, Any], Path]:
    began = time.monotonic()
    calibrating = {
        "--calib": request.calib,
        "--samples": request.samples,
        "--seqlen": request.seqlen,
        "--seed": request.seed,
        "--rounding nearest": request.nearest,
    }
    for option in (option for option, said in calibrating.items() if said):
        raise InputError(f"{option}: {folder} is quantized and keeps its integers; leave it out")
    recorded = result_of(folder)
    if recorded and (changed := changed_files(folder, recorded)):
        raise InputError(f"{folder}: {changed[0]}; convert a folder as its run left it")
    label = folder.resolve().name
    out = request.out or Path("outputs") / f"{label}-gguf"
    require_another(out, folder, request.against)
    source = open_source(folder)
    identity = {
        "quantkit": __version__,
        "convert": "gguf",
        "type": request.type,
        "outside": request.outside,
        "requantize": request.requantize,
        "source": fingerprint(source.checkpoint),
    }
    with open_journal(out, identity, fresh=request.fresh) as journal:
        unit = journal.finished.get("gguf")
        if unit is not None and not journal.verify_unit(unit):
            journal.drop_from("gguf")
        if "gguf" not in journal.finished:
            path = out / f"{label}-{_suffix(types_of(source, request.type, request.requantize))}.gguf"
            done = export(source, path, request.type, outside=request.outside, requantize=request.requantize)
            record = {"linears": [], "equal": done.equal, "rounded": done.rounded, "types": done.types}
            journal.append(Unit("gguf", path.name, done.sha256, record))
        unit = journal.finished["gguf"]
        copy_companions(folder, out, NOTES)
    architecture = source.architecture
    written = open_gguf_model(out / unit.file, architecture)
    document = _document(request, recorded, written, unit, out, str(request.against or folder))
    document["layers"] = _layers(recorded, written, unit.record)
    equal, rounded = unit.record["equal"], unit.record["rounded"]
    errors = list(rounded.values())
    document["converted"] = {
        "from": folder.name,
        "from_format": source.format.name if source.format else None,
        "made_by": writer(source.config, recorded),
        "lossless": not rounded,
        "equal": equal,
        "rounded": len(rounded),
        "weight_error": {"mean": sum(errors) / len(errors), "worst": max(errors)} if errors else None,
    }
    document["seconds"] = time.monotonic() - began
    _say(console, out / unit.file, f"{equal} linears keep their integers, {len(rounded)} are rounded")
    said = (recorded or {}).get("verification")
    same = not rounded and request.outside == "f16"
    return _finish(request, document, said if same else None, out, console, said), out


def _layers(recorded: Mapping[str, Any] | None, written: GGUFModel, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record per linear: what the run said of it, and the bytes it has now."""
    before = {str(layer.get("name")): layer for layer in (recorded or {}).get("layers") or []}
    found = []
    for linear in written.linears:
        kind = record["types"].get(linear.name)
        if kind is None or linear.scheme is None:
            continue
        found.append(
            {
                "name": linear.name,
                "layer": linear.layer,
                "kind": linear.local.rpartition(".")[2],
                "bits": linear.scheme.bits,
                "group_size": linear.scheme.group_size,
                "symmetric": linear.scheme.symmetric,
                "method": before.get(linear.name, {}).get("method", kind),
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "loss": before.get(linear.name, {}).get("loss", 0.0),
                "bytes": linear.out_features * TYPES[kind].row_bytes(linear.in_features),
                "type": kind,
            }
        )
    return found


# ---------------------------------------------------------------- from 16 bit


def _round(request: ExportRequest, console: Console) -> tuple[dict[str, Any], Path]:
    """A run of gptq that leaves the file alone; see `commands.quantize`."""
    if request.requantize:
        raise InputError(f"--requantize: {request.source} is not quantized; leave it out")
    kind, exact = request.type or DEFAULT_TYPE, request.outside == "f16"
    run = Request(
        method="gptq",
        model=request.source,
        command=request.command,
        scheme=kind,
        format="gguf",
        calib=request.calib,
        samples=request.samples,
        seqlen=request.seqlen,
        seed=request.seed,
        evaluation=request.evaluation,
        eval_samples=request.eval_samples,
        device=request.device,
        options=Options(rounding="nearest" if request.nearest else "gptq"),
        out=request.out or Path("outputs") / f"{label_of(request.source)}-gguf-{kind}",
        fresh=request.fresh,
        offline=request.offline,
        verify=request.verify,
        one_file=True,
        outside=request.outside,
    )
    result, out = quantize(run, console)
    if exact or not request.verify:
        return result, out
    # The embedding was rounded after the run: its tokens and limits are taken to measure the file.
    return _finish(request, result, None, out, console, dict(result)), out


# ---------------------------------------------------------------- the folder


def _suffix(types: Mapping[str, str]) -> str:
    kinds = list(types.values())
    return max(sorted(set(kinds)), key=kinds.count).upper()


def _document(
    request: ExportRequest, recorded: Mapping[str, Any] | None, written: GGUFModel, unit: Unit, out: Path, model: str
) -> dict[str, Any]:
    """What is true of the file whatever it was made from."""
    path = out / unit.file
    schemes = [linear.scheme for linear in written.linears if linear.scheme is not None]
    scheme = max(schemes, key=schemes.count)
    before = dict(recorded or {})
    beside = [found for pattern in NOTES for found in out.glob(pattern)]
    kept = {key: before[key] for key in ("model", "base_model", "method", "calibration", "options") if key in before}
    result = {
        "quantkit_version": __version__,
        "command": request.command,
        "model": model,
        "base_model": {"id": hub_id(model), "license": None},
        "method": "gguf",
        "calibration": None,
        "options": {},
    }
    return (
        result
        | kept
        | {
            "format": "gguf",
            "scheme": {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric},
            "bits_per_weight": written.bits_per_weight,
            "total_bytes": path.stat().st_size,
            "tensor_bytes": sum(info.nbytes for info in open_gguf(path).infos.values()),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(request.device),
            "device": str(request.device),
            "versions": versions(),
            "fallbacks": list(before.get("fallbacks") or []),
            "engines": {},
            "files": file_records(out, {path.name: sha256_of(path) for path in beside} | {unit.file: unit.sha256}),
            "verification": None,
        }
    )


def _finish(
    request: ExportRequest,
    document: dict[str, Any],
    carried: dict[str, Any] | None,
    out: Path,
    console: Console,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """quantkit.json, then the file measured from its own bytes; without the 16-bit model what is known is kept.

    carried: a verification that is true of the file; before: that of the source, whose tokens and limits are taken
    """
    document["verification"] = carried
    write_json(out / RESULT, document)
    if request.verify:
        asked = measured_like(
            before,
            out=out,
            command=request.command,
            against=request.against,
            evaluation=request.evaluation,
            eval_samples=request.eval_samples,
            device=request.device,
            offline=request.offline,
        )
        try:
            return verify_files(asked, console)
        except QuantkitError as error:
            if request.against is not None:
                raise
            document["fallbacks"].append(f"not measured again: {error}")
    write_result(out, document)
    return document


def _say(console: Console, path: Path, text: str) -> None:
    console.print(f"{path}: {text}", markup=False, highlight=False, soft_wrap=True)
