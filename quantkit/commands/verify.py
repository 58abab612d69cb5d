# SPDX-License-Identifier: Apache-2.0
"""`quantkit verify OUT`: hash what is there, measure it again, judge it, and write that down.

A folder of quantkit's gets a new verification in quantkit.json, and with it a new report and card. If a file is not the
one that the run wrote the verdict is FAIL, whatever the figures. A checkpoint of another tool is measured and judged
alike, and left as it is.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from rich.console import Console

from quantkit import __version__
from quantkit.calibration.load import load_eval
from quantkit.calibration.sources import BUNDLED, DEFAULT_EVAL
from quantkit.calibration.tokens import TokenSet, note_left_out, record_of, require_positions
from quantkit.checkpoint.journal import JOURNAL, locked
from quantkit.checkpoint.reader import fingerprint, shorten
from quantkit.errors import InputError, ModelError, NumericsError, QuantkitError
from quantkit.gguf.reading import GGUFModel, find_gguf, open_gguf_model
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.model.streaming import StreamedModel, open_model
from quantkit.model.tokenizer import tokenizer_of
from quantkit.pipeline.measure import QuantizedCheckpoint, measure, open_quantized
from quantkit.pipeline.memory import Allowance, Layout, Streams, keep, lay_out
from quantkit.pipeline.runtime import Runtime
from quantkit.report.terminal.progress import display
from quantkit.results.document import RESULT, read_result
from quantkit.results.folder import changed_files, write_result
from quantkit.serving.fit import fit_checkpoint, fit_stored
from quantkit.serving.needs import Work
from quantkit.settings.defaults import choose_seqlen, choose_serving, find_model, positions
from quantkit.verdict import Limits, verification_block

NOT_MEASURED: dict[str, Any] = {
    "perplexity": None,
    "perplexity_fp16": None,
    "kl_divergence": None,
    "kl_percentiles": {},
    "top1_agreement": None,
    "tokens": 0,
    "dtype": None,
    "layer_errors": [],
}


@dataclass(frozen=True)
class VerifyRequest:
    """What the user asked for. None means: not said, so what the run wrote down or the default decides."""

    out: Path
    command: str
    against: str | None = None
    evaluation: str | None = None
    seqlen: int | None = None
    eval_samples: int | None = None
    budget: int | None = None
    context: int | None = None
    kv: str | None = None
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vram: int | None = None
    ram: int | None = None
    offline: bool = False


def measured_like(
    before: Mapping[str, Any] | None,
    *,
    out: Path,
    command: str,
    against: str | None,
    evaluation: str | None,
    eval_samples: int | None,
    device: torch.device,
    offline: bool,
) -> VerifyRequest:
    """What asks to measure a folder that was made of another: on the other's tokens, unless some are named, and judged
    by its limits.

    before: the verification of the other, if it has one; the rest as in `VerifyRequest`
    """
    said = before or {}
    tokens = said.get("eval") or {} if evaluation is None else {}
    limits = said.get("limits") or {}
    return VerifyRequest(
        out=out,
        command=command,
        against=against,
        evaluation=evaluation or tokens.get("source"),
        seqlen=tokens.get("seqlen"),
        eval_samples=eval_samples or tokens.get("samples"),
        max_ppl_increase=limits.get("max_ppl_increase"),
        max_kl=limits.get("max_kl"),
        device=device,
        offline=offline,
    )


def verify_files(request: VerifyRequest, console: Console) -> dict[str, Any]:
    """Measure a checkpoint from its files and return the result document with a new "verification".

    In a folder of quantkit's it is quantkit.json, which is written anew beside report.html and README.md. For another
    checkpoint it holds quantkit_version, command, model, out, format, schemes, bits_per_weight, total_bytes, seconds,
    peak_rss_bytes, device, versions and verification, and nothing is written.

    Raises:
        OutputError: the folder of a run that is not finished, or that cannot be written.
        ModelError: no original to compare with, not a checkpoint that is supported, or not one of that original.
        InputError: options that cannot be. NumericsError: values that are not finite.
    """
    if not request.out.is_dir():
        raise ModelError(f"{request.out}: no such folder; expected a quantized checkpoint")
    ours = (request.out / RESULT).exists() or (request.out / JOURNAL).exists()
    with locked(request.out) if ours else nullcontext():
        return _verify(request, read_result(request.out) if ours else None, console)


def _verify(request: VerifyRequest, recorded: dict[str, Any] | None, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    out = request.out
    _limits(request, recorded)  # what they cannot be is told before anything is measured
    original = _original(request, recorded)
    tokens = _tokens(request, recorded, original)
    reasons = changed_files(out, recorded)
    for reason in reasons:
        console.print(reason, style="bold red", markup=False, highlight=False)
    console.print(f"{out} against {original.directory}", markup=False, highlight=False)
    console.print(
        f"evaluation: {tokens.source}, {tokens.samples} x {tokens.seqlen} tokens", markup=False, highlight=False
    )
    memory, quantized, measured = None, None, NOT_MEASURED
    try:
        quantized = _open(out, original, recorded)
        memory = _memory(request, recorded, original, quantized)
        spill = out if os.access(out, os.W_OK) else Path(gettempdir())
        runtime = Runtime(original, request.device, spill)
        layout = _layout(request, runtime, quantized, tokens)
        console.print(f"memory: {layout}", markup=False, highlight=False, soft_wrap=True)
        keep(layout, request.device)
        with display(console, request.device) as progress:
            measured = measure(replace(runtime, memory=layout.memory), quantized, tokens, progress)
    except (ModelError, NumericsError) as error:
        if not reasons:
            raise
        reasons.append(f"it cannot be measured: {error}")
    verification = _verification(request, recorded, measured, tokens, memory, reasons)
    if recorded is not None:
        return _write(out, recorded, verification)
    assert quantized is not None  # without a record nothing can have changed
    return _foreign_document(request, original, quantized, time.monotonic() - began) | {"verification": verification}


def _layout(
    request: VerifyRequest, runtime: Runtime, quantized: QuantizedCheckpoint | GGUFModel, tokens: TokenSet
) -> Layout:
    streams = Streams([(tokens.samples, tokens.seqlen)] * 2)
    work = Work(
        linears=quantized.decoder,
        on_gpu=request.device.type == "cuda",
        itemsize=runtime.dtype.itemsize,
        longest=tokens.seqlen,
        compared=True,
        head=next((linear for linear in quantized.linears if linear.unit == "head" and linear.scheme), None),
    )
    return lay_out(runtime.model, work, streams, request.device, Allowance(request.vram, request.ram))


# ---------------------------------------------------------------- what is there


def _open(out: Path, original: StreamedModel, recorded: Mapping[str, Any] | None) -> QuantizedCheckpoint | GGUFModel:
    """The weights of a folder: the GGUF file of a run that made one, or safetensors, or the only GGUF file."""
    gguf = find_gguf(out, recorded)
    if gguf is not None:
        return open_gguf_model(gguf, original)
    return replace(open_quantized(out, original), cast=(recorded or {}).get("torch_dtype"))


def _original(request: VerifyRequest, recorded: Mapping[str, Any] | None) -> StreamedModel:
    if request.against is not None:
        return open_model(find_model(request.against, offline=request.offline))
    if recorded is None:
        raise ModelError(
            f"{request.out}: no {RESULT}, so nothing says which model it was made from; give --against MODEL"
        )
    name = str(recorded.get("model"))
    try:
        directory = find_model(name, offline=request.offline)
    except QuantkitError as error:
        raise ModelError(f"{error}; it is the model that {request.out} was made from: give --against MODEL") from error
    original = open_model(directory)
    changed = _changed_original(request.out, original)
    if changed:
        raise ModelError(
            f"{directory}: not as it was when {request.out} was made from it ({shorten(changed)}); "
            "give --against MODEL to compare with it all the same"
        )
    return original


def _changed_original(out: Path, original: StreamedModel) -> list[str]:
    """The original's files that are not those of the journal, where there is one."""
    try:
        with (out / JOURNAL).open("rb") as file:
            then = json.loads(file.readline())["identity"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    now = fingerprint(original.checkpoint)
    return [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]


# ---------------------------------------------------------------- what it is measured with


def _tokens(request: VerifyRequest, recorded: Mapping[str, Any] | None, original: StreamedModel) -> TokenSet:
    """The evaluation that was asked for, or the recorded one if it can be had again, or the bundled one."""
    said = ((recorded or {}).get("verification") or {}).get("eval") or {}
    source = request.evaluation or said.get("source")
    again = source is not None and source == said.get("source")
    if source is None:
        return _load_eval(request, original, DEFAULT_EVAL, None, None)
    try:
        tokens = _load_eval(
            request, original, source, said.get("seqlen") if again else None, said.get("samples") if again else None
        )
    except InputError as error:
        if request.evaluation is not None or source in BUNDLED:
            raise
        tokens = _load_eval(request, original, DEFAULT_EVAL, None, None)
        return _noted(tokens, f"the bundled set, as {source} cannot be had again ({error})")
    if again and tokens.sha256 == said.get("sha256"):
        return replace(tokens, protocol=str(said.get("protocol")))
    if again and request.seqlen is None and request.eval_samples is None:
        return _noted(tokens, "its content has changed since the run")
    return tokens


def _load_eval(
    request: VerifyRequest, original: StreamedModel, source: str, seqlen: int | None, samples: int | None
) -> TokenSet:
    limit = positions(original.config)
    length = choose_seqlen(limit, request.seqlen, seqlen)
    tokens = load_eval(
        source,
        tokenizer_of(original.directory),
        seqlen=length,
        samples=request.eval_samples or (samples if length == seqlen else None),
        vocab_size=original.config.vocab_size,
        offline=request.offline,
    )
    require_positions(tokens, limit)
    return note_left_out(tokens, seqlen=request.seqlen)


def _noted(tokens: TokenSet, note: str) -> TokenSet:
    return replace(tokens, notes=(*tokens.notes, note))


def _memory(
    request: VerifyRequest,
    recorded: Mapping[str, Any] | None,
    original: StreamedModel,
    quantized: QuantizedCheckpoint | GGUFModel,
) -> dict[str, Any]:
    """What `fit` says of the files; what it said of the run itself is kept."""
    before = ((recorded or {}).get("verification") or {}).get("fit") or {}
    serving = choose_serving(
        positions(original.config),
        budget=request.budget or before.get("budget_bytes"),
        context=request.context or before.get("context"),
        kv=request.kv or before.get("kv"),
    )
    if isinstance(quantized, GGUFModel):
        now = fit_stored(original, quantized.stored(), **serving)
    else:
        now = fit_checkpoint(request.out, **serving)
    # The run knew what a config does not tell: that the zero points of an AWQ file are all in the middle.
    same = all(now[key] == before.get(key) for key in ("weights", "total_bytes", "budget_bytes", "context", "kv"))
    return before if same else before | now


# ---------------------------------------------------------------- what is said of it


def _verification(
    request: VerifyRequest,
    recorded: Mapping[str, Any] | None,
    measured: Mapping[str, Any],
    tokens: TokenSet,
    memory: dict[str, Any] | None,
    reasons: list[str],
) -> dict[str, Any]:
    return verification_block(measured, record_of(tokens), _limits(request, recorded), memory, reasons)


def _limits(request: VerifyRequest, recorded: Mapping[str, Any] | None) -> Limits:
    """As asked, or as the run was judged by."""
    before = ((recorded or {}).get("verification") or {}).get("limits") or {}
    rise = [r for r in (request.max_ppl_increase, before.get("max_ppl_increase")) if r is not None]
    kl = [k for k in (request.max_kl, before.get("max_kl")) if k is not None]
    return Limits(rise[0] if rise else Limits.max_ppl_increase, kl[0] if kl else None)


def _write(out: Path, recorded: dict[str, Any], verification: dict[str, Any]) -> dict[str, Any]:
    """The document with the new verification, written if the folder can be."""
    result = recorded | {"verification": verification}
    if verification["fit"] is not None:
        result["engines"] = verification["fit"]["engines"]
    if os.access(out, os.W_OK):
        write_result(out, result)
    return result


def _foreign_document(
    request: VerifyRequest, original: StreamedModel, quantized: QuantizedCheckpoint | GGUFModel, seconds: float
) -> dict[str, Any]:
    schemes: dict[str, int] = {}
    for linear in quantized.decoder:
        label = str(linear.scheme) if linear.scheme else "16 bit"
        schemes[label] = schemes.get(label, 0) + 1
    return {
        "quantkit_version": __version__,
        "command": request.command,
        "model": request.against or str(original.directory),
        "out": str(request.out),
        "format": "gguf" if isinstance(quantized, GGUFModel) else quantized.format.name,
        "schemes": schemes,
        "bits_per_weight": quantized.bits_per_weight,
        "total_bytes": sum((request.out / name).stat().st_size for name in quantized.files),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(request.device),
        "versions": versions(),
    }
