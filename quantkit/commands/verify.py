# SPDX-License-Identifier: Apache-2.0
"""`quantkit verify OUT`: hash what is there, measure it again, judge it, and write that down.

A folder of quantkit's gets a new verification in quantkit.json, and with it a new report and card. If a file is not the
one that the run wrote the verdict is FAIL, whatever the figures. A checkpoint of another tool is measured and judged
alike, and left as it is.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from quantkit import __version__
from quantkit.calibration.load import load_eval
from quantkit.calibration.sources import BUNDLED, DEFAULT_EVAL
from quantkit.calibration.tokens import TokenSet, as_asked, record_of, require_positions
from quantkit.checkpoint.journal import JOURNAL, locked
from quantkit.checkpoint.reader import Checkpoint, fingerprint, shorten
from quantkit.errors import InputError, ModelError, NumericsError, QuantkitError
from quantkit.gguf.metadata import metadata_differences, own_model
from quantkit.gguf.reading import GGUFModel, find_gguf, open_gguf_model
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.model.config_differences import config_differences, contradictions
from quantkit.model.shapes import Shapes, text_values
from quantkit.model.skeleton import Architecture
from quantkit.model.streaming import StreamedModel, open_model
from quantkit.model.tokenizer import tokenizer_of
from quantkit.model.tokenizer_differences import tokenizer_differences
from quantkit.pipeline.measure import measure
from quantkit.pipeline.memory import Allowance, Layout, Streams, keep, lay_out
from quantkit.pipeline.runtime import Runtime
from quantkit.quantized import QuantizedCheckpoint, architecture_in, open_quantized, require_complete
from quantkit.records import Fit, Foreign, Limits, Result, Tokens, Verification
from quantkit.report.terminal.screen import Terminal
from quantkit.results.document import RESULT, read_result
from quantkit.results.folder import changed_files, write_result
from quantkit.scheme import name_of
from quantkit.serving.fit import fit_checkpoint, fit_stored
from quantkit.serving.needs import Work
from quantkit.settings.defaults import choose_seqlen, choose_serving, find_model, positions
from quantkit.verdict import asked_limits, choose_limits, verification_of

# What must be the same in both config.json: tensors of equal shape can still be of another model.
SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)

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
    before: Verification | None,
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
    tokens = before.eval if before and evaluation is None else None
    limits = before.limits if before else Limits()
    return VerifyRequest(
        out=out,
        command=command,
        against=against,
        evaluation=tokens.source if tokens else evaluation,
        seqlen=tokens.seqlen if tokens else None,
        eval_samples=eval_samples or (tokens.samples if tokens else None),
        max_ppl_increase=limits.max_ppl_increase,
        max_kl=limits.max_kl,
        device=device,
        offline=offline,
    )


def verify_files(request: VerifyRequest, terminal: Terminal) -> Result | Foreign:
    """Measure a checkpoint from its files and return what quantkit.json says of it, with a new verification.

    In a folder of quantkit's quantkit.json is written anew, beside report.html and README.md. For a checkpoint of
    another tool nothing is written.

    Raises:
        OutputError: the folder of a run that is not finished, or that cannot be written.
        ModelError: no original to compare with, not a checkpoint that is supported, or not one of that original.
        InputError: options that cannot be. NumericsError: values that are not finite.
    """
    if not request.out.is_dir() and find_gguf(request.out, None) is None:
        raise ModelError(f"{request.out}: no such folder; expected a quantized checkpoint or a .gguf file")
    ours = (request.out / RESULT).exists() or (request.out / JOURNAL).exists()
    with locked(request.out) if ours else nullcontext():
        return _verify(request, read_result(request.out) if ours else None, terminal)


def _verify(request: VerifyRequest, recorded: Result | None, terminal: Terminal) -> Result | Foreign:
    began = time.monotonic()
    out = request.out
    before = recorded.verification if recorded else None
    asked = asked_limits(request.max_ppl_increase, request.max_kl)  # what they cannot be is told before all work
    limits = choose_limits(asked, before.limits if before else Limits())
    gguf = find_gguf(out, recorded)
    original = _original(request, recorded)
    tokens = _tokens(request, before.eval if before else None, original)
    reasons = changed_files(out, recorded)
    for reason in reasons:
        terminal.warn(reason)
    terminal.say(f"{out} against {original.directory}")
    terminal.say(f"evaluation: {tokens.source}, {tokens.samples} x {tokens.seqlen} tokens")
    memory, quantized, measured = None, None, NOT_MEASURED
    differences: list[str] = []
    try:
        quantized = _open(gguf, out, original, recorded)
        differences = _differences(quantized, original)
        for difference in differences:
            terminal.warn(difference)
        memory = _memory(request, before.fit if before else None, original, quantized)
        spill = quantized.directory if os.access(quantized.directory, os.W_OK) else Path(gettempdir())
        runtime = Runtime(original, request.device, spill)
        layout = _layout(request, runtime, quantized, tokens)
        terminal.say(f"memory: {layout}")
        keep(layout, request.device)
        with terminal.progress(request.device) as progress:
            measured = measure(replace(runtime, memory=layout.memory), quantized, tokens, progress)
        measured |= {"differences": differences} if differences else {}
    except (ModelError, NumericsError) as error:
        if not reasons and not differences:
            raise
        reasons += [*differences, f"it cannot be measured: {error}"]
    verification = verification_of(measured, record_of(tokens), limits, memory, reasons)
    if recorded is not None:
        return _write(out, recorded, verification)
    assert quantized is not None  # without a record nothing can have changed
    return _foreign(request, original, quantized, time.monotonic() - began, verification)


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


def _open(
    gguf: Path | None, out: Path, original: StreamedModel, recorded: Result | None
) -> QuantizedCheckpoint | GGUFModel:
    """The weights of a GGUF file, or of a folder of safetensors."""
    if gguf is not None:
        opened = open_gguf_model(gguf, original)
        return replace(opened, model=own_model(opened.file, original))
    checkpoint = open_quantized(out, lambda raw, tensors: _same_model(raw, tensors, original))
    require_complete(checkpoint, original.ignored)
    return replace(checkpoint, cast=recorded.torch_dtype if recorded else None)


def _differences(quantized: QuantizedCheckpoint | GGUFModel, original: StreamedModel) -> list[str]:
    """One line for each thing by which engines compute something else of the files than of the original."""
    if isinstance(quantized, GGUFModel):
        return metadata_differences(quantized.file, original)
    assert isinstance(quantized.model, Architecture)
    config = quantized.model.model.config
    return [
        *config_differences(config, original.model.config),
        *contradictions(quantized.raw, config),
        *tokenizer_differences(quantized.directory, original.directory),
    ]


def _same_model(raw: Mapping[str, Any], checkpoint: Checkpoint, original: StreamedModel) -> Shapes:
    """The model that a config.json's content describes, if it can be the original.

    What is beside the text decoder must be what the original has there.

    Raises:
        ModelError: it is another model.
    """
    for key in SAME:
        expected, value = getattr(original.config, key, None), text_values(raw).get(key)
        if value is not None and expected is not None and value != expected:
            raise ModelError(
                f"{checkpoint.directory}: config.json: {key} is {value!r:.60}, that of {original.directory} is "
                f"{expected!r:.60}; it was made from another model"
            )
    return replace(architecture_in(raw, checkpoint), copied=original.copied)


def _original(request: VerifyRequest, recorded: Result | None) -> StreamedModel:
    if request.against is not None:
        return open_model(find_model(request.against, offline=request.offline))
    if recorded is None:
        raise ModelError(
            f"{request.out}: no {RESULT}, so nothing says which model it was made from; give --against MODEL"
        )
    try:
        directory = find_model(recorded.model, offline=request.offline)
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
            then = dict(json.loads(file.readline())["identity"]["model"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    now = fingerprint(original.checkpoint)
    return [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]


# ---------------------------------------------------------------- what it is measured with


def _tokens(request: VerifyRequest, before: Tokens | None, original: StreamedModel) -> TokenSet:
    """The evaluation that was asked for, or the recorded one if it can be had again, or the bundled one."""
    source = request.evaluation or (before.source if before else None)
    again = before if before and source == before.source else None
    if source is None:
        return _load_eval(request, original, DEFAULT_EVAL, None, None)
    try:
        length, samples = (again.seqlen, again.samples) if again else (None, None)
        tokens = _load_eval(request, original, source, length, samples)
    except InputError as error:
        if request.evaluation is not None or source in BUNDLED:
            raise
        tokens = _load_eval(request, original, DEFAULT_EVAL, None, None)
        return _noted(tokens, f"the bundled set, as {source} cannot be had again ({error})")
    if again is not None and tokens.sha256 == again.sha256:
        return replace(tokens, protocol=again.protocol)
    if again is not None and request.seqlen is None and request.eval_samples is None:
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
    return as_asked(tokens, seqlen=request.seqlen)


def _noted(tokens: TokenSet, note: str) -> TokenSet:
    return replace(tokens, notes=(*tokens.notes, note))


def _memory(
    request: VerifyRequest, before: Fit | None, original: StreamedModel, quantized: QuantizedCheckpoint | GGUFModel
) -> Fit:
    """What `fit` says of the files; before: what it said of the run itself, which is kept."""
    serving = choose_serving(
        positions(original.config),
        budget=request.budget or (before.budget_bytes if before else None),
        context=request.context or (before.context if before else None),
        kv=request.kv or (before.kv if before else None),
    )
    if isinstance(quantized, GGUFModel):
        now = fit_stored(original, quantized.stored(), **serving)
    else:
        now = fit_checkpoint(request.out, **serving)
    if before is None:
        return now
    # The run knew what a config does not tell: that the zero points of an AWQ file are all in the middle.
    keys = ("weights", "total_bytes", "budget_bytes", "context", "kv")
    same = all(getattr(now, key) == getattr(before, key) for key in keys)
    return before if same else before.having(**{name: getattr(now, name) for name in now.model_fields_set})


# ---------------------------------------------------------------- what is said of it


def _write(out: Path, recorded: Result, verification: Verification) -> Result:
    """The document with the new verification, written if the folder can be."""
    result = recorded.having(verification=verification)
    if verification.fit is not None:
        result = result.having(engines=verification.fit.engines)
    if os.access(out, os.W_OK):
        write_result(out, result)
    return result


def _foreign(
    request: VerifyRequest,
    original: StreamedModel,
    quantized: QuantizedCheckpoint | GGUFModel,
    seconds: float,
    verification: Verification,
) -> Foreign:
    return Foreign(
        quantkit_version=__version__,
        command=request.command,
        model=request.against or str(original.directory),
        out=str(request.out),
        format=quantized.format_name,
        schemes=dict(Counter(name_of(linear.scheme) for linear in quantized.decoder)),
        bits_per_weight=quantized.bits_per_weight,
        total_bytes=sum((quantized.directory / name).stat().st_size for name in quantized.files),
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        device=str(request.device),
        versions=versions(),
        verification=verification,
    )
