# SPDX-License-Identifier: Apache-2.0
"""`quantkit convert SOURCE --to gguf`: a folder with one GGUF file, its measurements, report and card.

A quantized checkpoint keeps its integers (`gguf.export`). A 16-bit model is rounded straight into GGUF's blocks, with
calibration, by a run as any other (`commands.quantize`).
"""

import time
from collections.abc import Mapping
from pathlib import Path

from quantkit import __version__
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.checkpoint.reader import fingerprint
from quantkit.checkpoint.writer import write_json
from quantkit.commands.conversion import ExportRequest, measured_again, weight_error
from quantkit.commands.quantize import quantize
from quantkit.errors import InputError, ModelError
from quantkit.formats.gguf import TYPES
from quantkit.gguf.export import NOTES, export, open_source, types_of
from quantkit.gguf.reading import GGUFModel, open_gguf_model
from quantkit.hardware.machine import peak_device_bytes, peak_rss_bytes, versions
from quantkit.methods.table import Options
from quantkit.quantized import quantization_of, read_config, writer
from quantkit.records import BaseModelFacts, Converted, Linear, Numbers, Result, Verification
from quantkit.report.terminal.screen import Terminal
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


def to_gguf(request: ExportRequest, terminal: Terminal) -> tuple[Result, Path]:
    """Make the folder and return what its quantkit.json says and where it is.

    Raises:
        SchemeError: integers that the type cannot hold. QuantkitError: anything else that the user can mend.
    """
    if request.type is not None and request.type not in TYPES:
        raise InputError(f"--type: expected {', '.join(t for t in TYPES if t != 'f32')}, got {request.type!r}")
    folder = Path(request.source)
    if folder.is_dir() and _is_quantized(folder):
        return _keep_integers(request, folder, terminal)
    return _round(request, terminal)


def _is_quantized(folder: Path) -> bool:
    try:
        return bool(quantization_of(read_config(folder)))
    except ModelError:
        return False  # what is wrong with it is told by whoever opens it


# ---------------------------------------------------------------- integers as they are


def _keep_integers(request: ExportRequest, folder: Path, terminal: Terminal) -> tuple[Result, Path]:
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
    written = open_gguf_model(out / unit.file, source.model)
    equal, rounded = unit.record["equal"], unit.record["rounded"]
    before = recorded.verification if recorded else None
    result = _result(request, recorded, written, unit, str(request.against or folder)).having(
        layers=_layers(recorded, written, unit.record["types"]),
        converted=Converted(
            origin=folder.name,
            from_format=source.format.name,
            made_by=writer(source.raw, recorded),
            lossless=not rounded,
            equal=equal,
            rounded=len(rounded),
            weight_error=weight_error(rounded.values()),
        ),
        seconds=time.monotonic() - began,
        verification=before if not rounded and request.outside == "f16" else None,
    )
    terminal.say(f"{out / unit.file}: {equal} linears keep their integers, {len(rounded)} are rounded")
    return _finish(request, result, out, terminal, before), out


def _layers(recorded: Result | None, written: GGUFModel, types: Mapping[str, str]) -> list[Linear]:
    """The rows of the linears: what the run said of them, and the bytes they have now."""
    before = {layer.name: layer for layer in recorded.layers} if recorded else {}
    rows = []
    for linear in written.linears:
        kind = types.get(linear.name)
        if kind is not None and linear.scheme is not None:
            known = before.get(linear.name)
            nbytes = linear.out_features * TYPES[kind].row_bytes(linear.in_features)
            method, loss = (known.method, known.loss) if known else (kind, 0.0)
            rows.append(linear.record(nbytes, method=method, loss=loss, type=kind))
    return rows


# ---------------------------------------------------------------- from 16 bit


def _round(request: ExportRequest, terminal: Terminal) -> tuple[Result, Path]:
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
    result, out = quantize(run, terminal)
    if exact or not request.verify:
        return result, out
    # The embedding was rounded after the run: its tokens and limits are taken to measure the file.
    return _finish(request, result.having(verification=None), out, terminal, result.verification), out


# ---------------------------------------------------------------- the folder


def _suffix(types: Mapping[str, str]) -> str:
    kinds = list(types.values())
    return max(sorted(set(kinds)), key=kinds.count).upper()


def _result(request: ExportRequest, recorded: Result | None, written: GGUFModel, unit: Unit, model: str) -> Result:
    """What is true of the file whatever it was made from."""
    out, path = written.directory, written.file.path
    schemes = [linear.scheme for linear in written.linears if linear.scheme is not None]
    beside = [found for pattern in NOTES for found in out.glob(pattern)]
    return Result(
        quantkit_version=__version__,
        command=request.command,
        model=recorded.model if recorded else model,
        base_model=recorded.base_model if recorded else BaseModelFacts(id=hub_id(model), license=None),
        method=recorded.method if recorded else "gguf",
        format="gguf",
        scheme=Numbers(**Numbers.fields_of(max(schemes, key=schemes.count))),
        options=recorded.options if recorded else {},
        calibration=recorded.calibration if recorded else None,
        layers=[],
        bits_per_weight=written.bits_per_weight,
        total_bytes=path.stat().st_size,
        tensor_bytes=sum(info.nbytes for info in written.file.infos.values()),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=peak_device_bytes(request.device),
        device=str(request.device),
        versions=versions(),
        fallbacks=recorded.fallbacks if recorded else [],
        engines={},
        files=file_records(out, {path.name: sha256_of(path) for path in beside} | {unit.file: unit.sha256}),
        verification=None,
    )


def _finish(
    request: ExportRequest, result: Result, out: Path, terminal: Terminal, before: Verification | None = None
) -> Result:
    """quantkit.json, then the file measured from its own bytes; without the 16-bit model what is known is kept.

    before: the verification of the source, whose tokens and limits are taken
    """
    write_json(out / RESULT, result.content())
    if request.verify:
        return measured_again(request, result, out, terminal, before, offline=request.offline)
    write_result(out, result)
    return result
