# SPDX-License-Identifier: Apache-2.0
"""`quantkit convert OUT --to FORMAT`: a finished folder in another format, from the files of a checkpoint alone.

What is measured of a checkpoint belongs to its weights. Where the integers stay as they are so do the weights, and the
measurements are carried over; otherwise they are void, and made again where the 16-bit model is at hand.
"""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.checkpoint.companions import left_out
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.checkpoint.reader import fingerprint
from quantkit.checkpoint.writer import require_disk
from quantkit.commands.conversion import FP16, ConvertRequest, measured_again, unfinished, weight_error
from quantkit.commands.convert_from_gguf import convert_from_gguf
from quantkit.convert.plan import Conversion, make_conversion
from quantkit.convert.write import write_unit
from quantkit.dtypes import SERVED
from quantkit.errors import InputError
from quantkit.formats import FORMATS
from quantkit.gguf.reading import find_gguf
from quantkit.hardware.machine import device_name, peak_rss_bytes, versions
from quantkit.model.config import with_dtype, with_older_keys
from quantkit.plan import DISK_MARGIN, OUTSIDE
from quantkit.quantized import architecture_in, open_quantized, writer
from quantkit.records import BaseModelFacts, Converted, Fit, Linear, Numbers, Result, Verification
from quantkit.report.terminal.screen import Terminal
from quantkit.results.document import RESULT
from quantkit.results.folder import (
    changed_files,
    file_records,
    require_another,
    result_of,
    sha256_of,
    write_beside,
    write_result,
)
from quantkit.serving.engines import SIXTEEN_BIT, heads_of, require_engine
from quantkit.serving.fit import fit_checkpoint
from quantkit.settings.defaults import choose_serving, positions
from quantkit.verdict import choose_limits, judged_again

TARGETS = (*(name for name, row in FORMATS.items() if row.quant_method), FP16)


def convert(request: ConvertRequest, terminal: Terminal) -> tuple[Result, Path]:
    """Convert a checkpoint and return what its quantkit.json says and the folder it is in.

    Each of its "layers" says what it was before and whether it is equal; "converted" says it of all.

    Raises:
        SchemeError: the target cannot hold the checkpoint as it is, and requantize is False.
        EngineError: the engine would not load the result.
        QuantkitError: a source that is not supported or damaged, an output folder that cannot be written.
    """
    began = time.monotonic()
    if request.to not in TARGETS:
        raise InputError(f"--to: expected {', '.join(TARGETS)}, got {request.to!r}")
    folder = Path(request.source)
    if (file := find_gguf(folder, None)) is not None:
        return convert_from_gguf(request, file, terminal)
    recorded = result_of(folder)
    source = open_quantized(folder, architecture_in)
    out = request.out or Path("outputs") / f"{folder.resolve().name}-{request.to}"
    require_another(out, folder, request.against)
    conversion = make_conversion(source, FORMATS.get(request.to), out, requantize=request.requantize)
    if conversion.lossless or conversion.format is None:
        for option, said in (("--eval", request.evaluation), ("--eval-samples", request.eval_samples)):
            if said is not None:
                raise InputError(f"{option}: nothing is measured here, as no integer changes; leave it out")
    if request.engine is not None:
        _require_engine(request.engine, conversion)
    _announce(terminal, request, conversion)
    hashes = fingerprint(source.checkpoint)
    missing = [shard.file_bytes for shard in conversion.shards if not (out / shard.file).exists()]
    require_disk(out, sum(missing) + DISK_MARGIN)
    with open_journal(out, _identity(request, conversion, hashes), fresh=request.fresh) as journal:
        for shard in terminal.steps(unfinished(journal, conversion.shards), "convert"):
            journal.append(write_unit(conversion, shard))
        result = _finish(request, conversion, recorded, hashes, tuple(journal.finished.values()), began)
    if not conversion.lossless and conversion.format is not None:
        before = recorded.verification if recorded else None
        offline = request.offline or request.against is None
        result = measured_again(request, result, out, terminal, before, offline=offline)
    return result, out


def _require_engine(engine: str, conversion: Conversion) -> None:
    linears = [target.linear for target in conversion.targets if target.linear.layer != OUTSIDE or target.linear.scheme]
    require_engine(
        engine,
        conversion.format.name if conversion.format else SIXTEEN_BIT,
        linears,
        heads_of(conversion.source.model.config),
        act_order=bool(conversion.quantization_config.get("desc_act")),
    )


def _identity(request: ConvertRequest, conversion: Conversion, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the bytes of the shards depend on."""
    rounds = not conversion.lossless and conversion.format is not None
    return {
        "quantkit": __version__,
        "convert": request.to,
        "requantize": request.requantize,
        "source": dict(hashes),
    } | ({"torch": torch.__version__, "device": device_name(torch.device("cpu"))} if rounds else {})


def _announce(terminal: Terminal, request: ConvertRequest, conversion: Conversion) -> None:
    source = conversion.source
    rounded = [target for target in conversion.targets if target.obstacle is not None]
    lines = [f"{request.source} ({source.format.name}) -> {conversion.out} ({request.to})"]
    if conversion.lossless:
        lines.append("every code, scale and zero point stays as it is")
    elif conversion.format is None:
        lines.append("each weight becomes the float16 number nearest to what it stands for")
    else:
        lines.append(f"{len(rounded)} of {len(conversion.targets)} linears are rounded again: {rounded[0].obstacle}")
    lines += [f"left out, as it changes nothing: {name}" for name in conversion.left_out]
    for line in lines:
        terminal.say(line)


# ---------------------------------------------------------------- the folder


def _finish(
    request: ConvertRequest,
    conversion: Conversion,
    recorded: Result | None,
    hashes: Mapping[str, str],
    units: tuple[Unit, ...],
    began: float,
) -> Result:
    """Write what engines and people read beside the shards."""
    out, source = conversion.out, conversion.source
    files = {unit.file: unit.sha256 for unit in units}
    tensors = {name: (shard.file, spec.nbytes) for shard in conversion.shards for name, spec in shard.tensors.items()}
    total = sum(size for _, size in tensors.values())
    weight_map = {name: file for name, (file, _) in tensors.items()}
    directory = source.directory
    files |= write_beside(out, directory, weight_map, total, _config(conversion, recorded), conversion.format)
    result = _result(request, conversion, recorded, hashes, units)
    result = result.having(tensor_bytes=total, seconds=time.monotonic() - began, files=file_records(out, files))
    write_result(out, result)
    return result


def _config(conversion: Conversion, recorded: Result | None) -> dict[str, Any]:
    """The source's config.json with the new quantization."""
    config = with_older_keys(
        {k: v for k, v in conversion.source.raw.items() if k not in ("quantization_config", "compression_config")}
    )
    if conversion.format is not None:
        return config | {"quantization_config": conversion.quantization_config}
    return with_dtype(config, (recorded and recorded.torch_dtype) or SERVED)


def _result(
    request: ConvertRequest,
    conversion: Conversion,
    recorded: Result | None,
    hashes: Mapping[str, str],
    units: tuple[Unit, ...],
) -> Result:
    source, folder = conversion.source, Path(request.source)
    rows = [Linear.model_validate(row) for unit in units for row in unit.record["linears"]]
    errors = [row.weight_error for row in rows if row.weight_error is not None and not row.equal]
    known = {row.name: row for row in recorded.layers} if recorded else {}
    quantized = [row for row in rows if row.scheme is not None]
    weights = sum(row.weights for row in quantized)
    made_by = writer(source.raw, recorded)
    fit = _fit(conversion, recorded)
    verification, note = _carried(request, conversion, recorded, fit)
    notes = [*(recorded.fallbacks if recorded else []), *_notes(conversion, made_by), note]
    return Result(
        quantkit_version=__version__,
        command=request.command,
        model=recorded.model if recorded else request.against or str(folder),
        base_model=(recorded and recorded.base_model) or BaseModelFacts(id=None, license=None),
        method=recorded.method if recorded else source.quantization["quant_method"],
        format=conversion.format.name if conversion.format else FP16,
        scheme=_main_scheme(quantized),
        options=recorded.options if recorded else {},
        calibration=recorded.calibration if recorded else None,
        layers=[_layer(row, known.get(row.name)) for row in quantized],
        bits_per_weight=8 * sum(row.bytes for row in quantized) / weights if weights else 16.0,
        total_bytes=sum(shard.file_bytes for shard in conversion.shards),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=0,
        device="cpu",
        torch_dtype=recorded.torch_dtype if recorded else None,
        versions=versions(),
        fallbacks=list(dict.fromkeys(notes)),
        engines=fit.engines,
        converted=Converted(
            origin=str(folder),
            from_format=source.format.name,
            made_by=made_by,
            source=dict(hashes),
            source_result_sha256=sha256_of(folder / RESULT) if (folder / RESULT).is_file() else None,
            lossless=conversion.lossless,
            equal=sum(bool(row.equal) for row in rows),
            rounded=len(errors),
            weight_error=weight_error(errors),
        ),
        verification=verification,
    )


def _main_scheme(quantized: list[Linear]) -> Numbers:
    """The scheme that most linears have; 16 bits where none is quantized."""
    if not quantized:
        return Numbers(bits=16, group_size=-1, symmetric=True)
    ((scheme, _),) = Counter(row.scheme for row in quantized).most_common(1)
    return Numbers(**Numbers.fields_of(scheme))


def _layer(row: Linear, known: Linear | None) -> Linear:
    """What the source says of a linear (its loss is that of its integers), with what it is now."""
    method, loss = (known.method, known.loss) if known else ("unknown", None)
    if not row.equal:
        method, loss = "rtn", None
    return (known or row).having(**row.content() | {"method": method, "loss": loss})


def _notes(conversion: Conversion, made_by: str) -> list[str]:
    source = conversion.source
    notes = [f"converted from {source.format.name}, made by {made_by}"]
    rounded = [target for target in conversion.targets if target.obstacle is not None]
    if rounded:
        notes.append(f"{len(rounded)} linears were rounded again ({rounded[0].linear.name}: {rounded[0].obstacle})")
    notes += left_out(source.directory)
    return notes + [f"tensor {name} changes nothing and was left out" for name in conversion.left_out]


def _fit(conversion: Conversion, recorded: Result | None) -> Fit:
    """Memory and engines of the new files, for what the source was judged with."""
    before = recorded.verification.fit if recorded and recorded.verification else None
    serving = choose_serving(
        positions(conversion.source.model.config),
        budget=before.budget_bytes if before else None,
        context=before.context if before else None,
        kv=before.kv if before else None,
    )
    return fit_checkpoint(conversion.out, **serving)


# ---------------------------------------------------------------- what was measured


def _carried(
    request: ConvertRequest, conversion: Conversion, recorded: Result | None, fit: Fit
) -> tuple[Verification | None, str]:
    """The verification of the source if it is one of these weights, judged with the new files' memory; and a note."""
    before = recorded.verification if recorded else None
    if before is None:
        return None, "the source came without a verification: `quantkit verify` measures this folder"
    if not conversion.lossless:
        return None, "the source's verification is not that of these weights"
    if changed := changed_files(Path(request.source), recorded):
        return None, f"the source's verification is not that of its files: {changed[0]}"
    note = "measured before it was converted: codes, scales and zero points are equal, so these are its weights"
    return judged_again(before, choose_limits(before.limits), fit), note
