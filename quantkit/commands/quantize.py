# SPDX-License-Identifier: Apache-2.0
"""One command from request to finished folder: resolve, plan, load tokens, run, write what is beside the shards."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.calibration.tokens import TokenSet, notes_of
from quantkit.checkpoint.companions import left_out
from quantkit.commands.quantize_result import Run, file_made, finish, is_done, recorded_in, remove_shards
from quantkit.errors import InputError
from quantkit.formats import Format
from quantkit.formats.gguf import GGUF_ALONE
from quantkit.gguf.architecture import check_architecture
from quantkit.gguf.tokenizer import tokenizer_metadata
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.methods.table import METHODS, Options
from quantkit.model.opening import open_planned
from quantkit.model.skeleton import Architecture
from quantkit.model.streaming import StreamedModel
from quantkit.pipeline.job import Job
from quantkit.pipeline.memory import Allowance, keep, laid_out, lay_out_job
from quantkit.pipeline.run import run
from quantkit.pipeline.runtime import Runtime
from quantkit.plan import OUTSIDE, Plan, dividing, make_plan, resolved
from quantkit.recipe import Recipe, explained, method_resolver, resolver, unmatched
from quantkit.records import Fit, Limits, Result
from quantkit.report.terminal.screen import Terminal
from quantkit.report.terminal.summary import recipe_table
from quantkit.results.folder import require_another
from quantkit.scheme import Scheme, name_of
from quantkit.serving.fit import fit
from quantkit.settings.defaults import (
    choose_format,
    choose_recipe,
    choose_scheme,
    find_source,
    label_of,
)
from quantkit.settings.request import Request, config_options, limits_of, serving
from quantkit.settings.tokens import tokens_of
from quantkit.stats import ENOUGH_FOR_WIDTH, ENOUGH_TOKENS
from quantkit.units import format_bytes


def quantize(request: Request, terminal: Terminal, ranks: Ranks = ALONE) -> tuple[Result, Path]:
    """Run a request to the end and return the content of quantkit.json and the folder it is in.

    ranks: the processes that share the run; each calls this, and each returns the same.

    Raises:
        QuantkitError: anything the user can fix, before hours are spent where that can be known before.
    """
    began = time.monotonic()
    _refuse_together(request, ranks)
    recipe = choose_recipe(request.recipe, request.model)
    request, unused = _without_calibration(request, recipe)
    asked = _resolve(request, recipe)
    model, plan, memory = asked.model, asked.plan, asked.memory
    calibrated, evaluated = asked.tokens
    runtime = Runtime(model, request.device, asked.out, ranks=ranks)
    job = Job(
        runtime,
        plan,
        request.method,
        request.options,
        calibrated,
        evaluated,
        inputs=request.inputs,
        amend=request.amend,
    )
    _require_samples_for_all(job)
    measured_on = [(ranks.most(evaluated.samples), evaluated.seqlen)] * 2 if evaluated else []
    layout = lay_out_job(job, measured_on, Allowance(request.vram, request.ram, request.place))
    job = laid_out(job, layout)
    notes = [
        *asked.smaller_groups,
        *unused,
        *_unused_drift(job),
        *_few_tokens(job),
        *_unmatched_rules(recipe, plan),
        *left_out(model.directory),
    ]
    too_large = [_too_large(memory, evaluated)] if not memory.fits else []
    _announce(terminal, request, recipe, job, [*notes, *notes_of(calibrated, evaluated), *too_large])
    terminal.say(f"memory: {layout}")
    keep(layout, job.runtime.device)
    before = recorded_in(job.runtime.folder)
    described = Run(request, job, asked.scheme, asked.limits, memory, layout, notes, before, began)
    results: list[Result] = []
    with terminal.progress(request.device) as progress:
        outcome = run(
            job,
            progress,
            fresh=request.fresh,
            finish=lambda outcome: results.append(finish(described, outcome)),
            enough=lambda units: ranks.size == 1 and is_done(described, units),
            made=lambda: ranks.size == 1 and file_made(described),
        )
    if outcome is None:
        if plan.temporary_shards:
            remove_shards(plan, job.runtime.folder)
        line = f"{job.runtime.folder}: finished before; `quantkit verify` measures it again, --fresh makes it again"
        terminal.say(line)
        results += [before] if before else []
    return Result.model_validate(ranks.agree(results[0].content() if results else None)), job.runtime.folder


Tokens = tuple[TokenSet | None, TokenSet | None]  # to calibrate with, and to measure on


@dataclass(frozen=True)
class _Asked:
    """What a request comes to: known before any weight is read.

    smaller_groups: see `plan.dividing`
    """

    limits: Limits
    scheme: Scheme
    model: StreamedModel
    plan: Plan
    memory: Fit
    tokens: Tokens
    out: Path
    smaller_groups: list[str]


def _resolve(request: Request, recipe: Recipe) -> _Asked:
    limits = limits_of(request, recipe)
    scheme = choose_scheme(request.method, recipe, request.asked_scheme, request.format)
    fmt = GGUF_ALONE if request.one_file else choose_format(request.format, request.method, scheme, recipe)
    source = find_source(request.model, offline=request.offline)
    out = request.out or default_out(request, scheme, fmt)
    require_another(out, source.directory)

    def planned(model: Architecture) -> tuple[Plan, Fit, Tokens, list[str]]:
        if fmt.block_bytes is not None:
            check_architecture(model)  # and the tokenizer: what llama.cpp has no name for is told now
            tokenizer_metadata(source.directory, model.config.vocab_size, {})
        resolve = resolver(recipe, scheme, model.family.sixteen_bit)
        smaller: list[str] = []
        if request.group_size is None:
            resolve, smaller = dividing(model, resolve, fmt)
        with explained(recipe):
            plan = make_plan(
                model,
                resolve,
                fmt,
                head=resolve(model.head_name or "", OUTSIDE),
                method_of=method_resolver(recipe, request.method),
                **config_options(request.options),
            )
        methods = methods_of(plan, request.method)
        if request.options.tune and not all(map(_calibrates, methods)):
            raise InputError("--quality best: tunes what is calibrated; the recipe has rules with method: rtn")
        memory = fit(model, plan, engine=request.engine, **serving(request, recipe, model))
        return plan, memory, tokens_of(request, recipe, model, source.directory, methods), smaller

    model, (plan, memory, tokens, smaller) = open_planned(source, planned)
    return _Asked(limits, scheme, model, plan, memory, tokens, out, smaller)


def _refuse_together(request: Request, ranks: Ranks) -> None:
    """Options that do not go with each other, or not with several processes."""
    original = request.inputs == "original"
    if original and request.options.tune:
        raise InputError("--inputs original: --quality best tunes on quantized inputs; leave one of them out")
    for option, said in (("--quality best", request.options.tune), ("--inputs original", original)):
        if said and ranks.size > 1:
            raise InputError(f"{option}: in one process only; leave it out, or start the command without torchrun")


def _calibrates(method: str | None) -> bool:
    return method is not None and METHODS[method].calibrates


def methods_of(plan: Plan, usual: str) -> set[str]:
    """The methods that a plan needs; usual: that of linears which name none."""
    return {linear.method or usual for linear in plan.quantized}


def _require_samples_for_all(job: Job) -> None:
    size = job.runtime.ranks.size
    for tokens in (job.evaluation, job.calibration):
        if tokens is not None and tokens.samples < size:
            raise InputError(f"{tokens.source}: {tokens.samples} windows for {size} processes; start fewer")
    if job.reference is not None and job.reference.samples < size:
        raise InputError(
            f"--drift-samples: {job.reference.samples} windows for {size} processes; use {size} or more, or start fewer"
        )


def _unused_drift(job: Job) -> list[str]:
    """A note, where so many samples were to run through the original, and none or all do for other reasons."""
    if job.options.drift_samples is None or (job.reference and not job.options.tune):
        return []
    why = "--quality best runs all" if job.options.tune else "no drift is made up for here"
    return [f"--drift-samples: {why}; left out"]


def _few_tokens(job: Job) -> list[str]:
    """Notes, where there is too little calibration for the width of linears, or for tuning."""
    calibrated = [linear for linear in job.plan.quantized if METHODS[job.method_of(linear)].calibrates]
    if job.calibration is None or not calibrated:
        return []
    tokens, seqlen = job.calibration.input_ids.numel() * job.runtime.ranks.size, job.calibration.seqlen
    widest = max(calibrated, key=lambda linear: linear.in_features)
    notes = []
    if tokens < widest.in_features:
        notes.append(
            f"calibration: {tokens:,} tokens are fewer than the {widest.in_features:,} inputs of {widest.kind}, so "
            f"rounding goes by them less; use --samples {-(-ENOUGH_FOR_WIDTH * widest.in_features // seqlen)} or more"
        )
    if job.options.tune and tokens < ENOUGH_TOKENS:
        notes.append(
            f"--quality best: {tokens:,} tokens are little to tune on, and may make it worse; use --samples "
            f"{-(-ENOUGH_TOKENS // seqlen)} or more"
        )
    return notes


def _unmatched_rules(recipe: Recipe, plan: Plan) -> list[str]:
    """See `recipe.unmatched`."""
    everything = plan.linears if plan.head is None else (*plan.linears, plan.head)
    return unmatched(recipe, [(linear.name, linear.layer) for linear in everything])


def _without_calibration(request: Request, recipe: Recipe) -> tuple[Request, list[str]]:
    """Where no method calibrates, the request without what only calibration uses, and a note that names it."""
    if any(map(_calibrates, [request.method, *(rule.method for rule in recipe.rules)])):
        return request, []
    options = request.options
    given = {
        "--calib": request.calib is not None,
        "--samples": request.samples is not None,
        "--seed": request.seed != 0,
        "--inputs": request.inputs != "quantized",
        "--no-act-order": options.act_order != Options.act_order,
        "--damp": options.damp != Options.damp,
        "--correct": options.correct != Options.correct,
        "--drift-samples": options.drift_samples is not None,
        "--refine": options.refine != Options.refine,
    }
    unused = [option for option, said in given.items() if said]
    bare = replace(request, calib=None, samples=None, seed=0, inputs="quantized", options=Options())
    return bare, [f"{', '.join(unused)}: nothing is calibrated here; left out"] if unused else []


def _too_large(memory: Fit, evaluated: TokenSet | None) -> str:
    so = "; the verdict will be FAIL" if evaluated else ""
    return (
        f"does not fit: {format_bytes(memory.total_bytes)} with {memory.context:,} tokens of context, of "
        f"{format_bytes(memory.budget_bytes)}{so} (`quantkit fit` says what would fit)"
    )


def default_out(request: Request, scheme: Scheme, fmt: Format) -> Path:
    """outputs/<model>-<method>-w<bits>-g<group>[-<format>]."""
    usual = fmt.name == METHODS[request.method].formats[0]
    label = label_of(request.model)
    tail = "" if usual else f"-{fmt.name}"
    numbers = f"w{scheme.bits}-g{scheme.group_size}" if scheme.grid == "integer" else scheme.grid
    return Path("outputs") / f"{label}-{request.method}-{numbers}{tail}"


def _announce(terminal: Terminal, request: Request, recipe: Recipe, job: Job, notes: Sequence[str]) -> None:
    plan = job.plan
    schemes = Counter(name_of(linear.scheme) for linear in plan.linears)
    shown = ", ".join(f"{count} linears {name}" for name, count in schemes.items())
    lines = [
        f"{request.method} {request.model} -> {job.runtime.folder}  (stored as {plan.format.name}: {shown})",
        f"output {format_bytes(plan.served_bytes)}, {plan.bits_per_weight:.3f} bits per quantized "
        f"weight" + (f"; the same integers beside it in {format_bytes(plan.file_bytes)}" if plan.beside_bytes else ""),
    ]
    if job.runtime.ranks.size > 1:
        lines.append(f"{job.runtime.ranks.size} processes, each with its share of the samples and rows")
    for name, tokens in (("calibration", job.calibration), ("evaluation", job.evaluation)):
        if tokens is not None:
            lines.append(f"{name}: {tokens.source}, {tokens.samples} x {tokens.seqlen} tokens")
    for line in (*lines, *notes):
        terminal.say(line)
    if recipe.rules:
        terminal.show(recipe_table(resolved(plan, job.method)))
