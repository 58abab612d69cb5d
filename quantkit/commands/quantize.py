# SPDX-License-Identifier: Apache-2.0
"""One command from request to finished folder: resolve, plan, load tokens, run, write what is beside the shards."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantkit import __version__
from quantkit.calibration import load as calibration
from quantkit.calibration.load import TokenSet, notes_of
from quantkit.checkpoint.journal import Unit
from quantkit.errors import InputError, OutputError
from quantkit.formats import Format
from quantkit.formats.gguf import GGUF
from quantkit.gguf.architecture import check_architecture
from quantkit.gguf.export import export
from quantkit.gguf.tokenizer import tokenizer_metadata
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.methods.options import Options
from quantkit.model.shapes import Shapes
from quantkit.model.streaming import StreamedModel, open_model
from quantkit.model.tokenizer import tokenizer_of
from quantkit.pipeline.job import Job
from quantkit.pipeline.memory import keep, laid_out, lay_out_job
from quantkit.pipeline.run import Outcome, run
from quantkit.plan import OUTSIDE, Plan, make_plan, resolved
from quantkit.recipe import Recipe, explained, method_resolver, resolver, shipped, unmatched
from quantkit.report.terminal.progress import display
from quantkit.report.terminal.summary import recipe_table
from quantkit.results.document import read_result
from quantkit.results.folder import (
    file_records,
    links_left_out,
    quantized_config,
    require_another,
    sha256_of,
    write_beside,
    write_result,
)
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit
from quantkit.settings.defaults import (
    DEFAULT_FORMATS,
    DEFAULT_SAMPLES,
    choose_format,
    choose_recipe,
    choose_scheme,
    choose_seqlen,
    choose_serving,
    find_model,
    hub_id,
    positions,
)
from quantkit.units import format_bytes
from quantkit.verdict import Limits, verification_block


@dataclass(frozen=True)
class Request:
    """What the user asked for. None means: not said, so the recipe or the default decides."""

    method: str
    model: str
    command: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str | None = None
    recipe: Path | None = None
    calib: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    evaluation: str | None = None
    eval_samples: int | None = None
    budget: int | None = None
    context: int | None = None
    kv: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: Options = field(default_factory=Options)
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    out: Path | None = None
    fresh: bool = False
    offline: bool = False
    verify: bool = True
    place: str | None = None
    engine: str | None = None
    vram: int | None = None
    ram: int | None = None
    inputs: str = "quantized"
    amend: bool = False  # another recipe than that of the finished layers makes anew what differs


def quantize(request: Request, console: Console, ranks: Ranks = ALONE) -> tuple[dict[str, Any], Path]:
    """Run a request to the end and return the result document (quantkit.json) and the folder it is in.

    ranks: the processes that share the run; each calls this, and each returns the same.

    Raises:
        QuantkitError: anything the user can fix, before hours are spent where that can be known before.
    """
    began = time.monotonic()
    _refuse_together(request, ranks)
    recipe = choose_recipe(request.recipe, request.model)
    request, unused = _without_calibration(request, recipe)
    asked = _resolve(request, recipe)
    model, plan = asked.model, asked.plan
    memory = fit(model, plan, engine=request.engine, **serving(request, recipe, model))
    methods = {linear.method for linear in plan.quantized}
    calibrated, evaluated = tokens_of(request, recipe, model, model.directory, methods)
    job = Job(
        model,
        plan,
        request.method,
        request.options,
        calibrated,
        evaluated,
        asked.out,
        request.device,
        inputs=request.inputs,
        amend=request.amend,
        ranks=ranks,
    )
    _require_samples_for_all(job)
    measured_on = [(ranks.most(evaluated.samples), evaluated.seqlen)] * 2 if evaluated else []
    layout = lay_out_job(job, measured_on, vram=request.vram, ram=request.ram, place=request.place)
    job = laid_out(job, layout)
    told = [*unused, *_unused_drift(job), *_unmatched_rules(recipe, plan), *links_left_out(model.directory)]
    too_large = [_too_large(memory, evaluated)] if not memory["fits"] else []
    _announce(console, request, recipe, job, [*told, *notes_of(calibrated, evaluated), *too_large])
    console.print(f"memory: {layout}", highlight=False, markup=False, soft_wrap=True)
    keep(layout, job.device)
    finished: list[dict[str, Any]] = []
    before = _recorded(job.out)

    def finish(outcome: Outcome) -> None:
        again = before if outcome.reused == len(outcome.units) else None  # all was there, and is only measured
        continued = _continued(outcome) if again is None else []
        outcome = replace(outcome, fallbacks=(*outcome.fallbacks, *told, *continued))
        result = _document(request, job, outcome, asked.scheme, model.directory, memory, asked.limits)
        cost = _cost(result, time.monotonic() - began, again)
        finished.append(_finish(job, outcome, model.directory, result | cost | {"memory": layout.record()}))

    def enough(units: Sequence[Unit]) -> bool:
        same = before is not None and ranks.size == 1 and _finished_before(job, units, memory, asked.limits, before)
        finished.extend([before] if before and same else [])
        return same

    with display(console, request.device) as progress:
        outcome = run(job, progress, fresh=request.fresh, finish=finish, enough=enough)
    if outcome is None:
        line = f"{job.out}: finished before; `quantkit verify` measures it again, --fresh makes it again"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return ranks.agree(finished[0] if finished else None), job.out


@dataclass(frozen=True)
class _Asked:
    """What a request comes to: known before any weight is read."""

    limits: Limits
    scheme: Scheme
    model: StreamedModel
    plan: Plan
    out: Path


def _resolve(request: Request, recipe: Recipe) -> _Asked:
    limits = limits_of(request, recipe)
    scheme = choose_scheme(request.method, recipe, request.bits, request.group_size, request.symmetric, request.format)
    fmt = choose_format(request.format, request.method, scheme, recipe)
    directory = find_model(request.model, offline=request.offline)
    out = request.out or default_out(request, scheme, fmt)
    require_another(out, directory)
    model = open_model(directory)
    if fmt is GGUF:
        check_architecture(model.config)  # and the tokenizer: what llama.cpp has no name for is told now
        tokenizer_metadata(directory, model.config.vocab_size, {})
    resolve = resolver(recipe, scheme)
    with explained(recipe):
        plan = make_plan(
            model,
            resolve,
            fmt,
            head=resolve(model.head_name or "", OUTSIDE),
            method_of=method_resolver(recipe, request.method),
            **config_options(request.options),
        )
    if request.options.tune and any(linear.method == "rtn" for linear in plan.quantized):
        raise InputError("--quality best: tunes what gptq and awq round; the recipe has rules with method: rtn")
    return _Asked(limits, scheme, model, plan, out)


def _refuse_together(request: Request, ranks: Ranks) -> None:
    """Options that do not go with each other, or not with several processes."""
    original = request.inputs == "original"
    if original and request.options.tune:
        raise InputError("--inputs original: --quality best tunes on quantized inputs; leave one of them out")
    for option, said in (("--quality best", request.options.tune), ("--inputs original", original)):
        if said and ranks.size > 1:
            raise InputError(f"{option}: in one process only; leave it out, or start the command without torchrun")


def _require_samples_for_all(job: Job) -> None:
    size = job.ranks.size
    for tokens in (job.evaluation, job.calibration):
        if tokens is not None and tokens.samples < size:
            raise InputError(f"{tokens.source}: {tokens.samples} windows for {size} processes; start fewer")
    if job.beside is not None and job.beside.samples < size:
        raise InputError(
            f"--drift-samples: {job.beside.samples} windows for {size} processes; use {size} or more, or start fewer"
        )


def _unused_drift(job: Job) -> list[str]:
    """A note, where so many samples were to run through the original, and none or all do for other reasons."""
    if job.options.drift_samples is None or (job.beside and not job.options.tune):
        return []
    why = "--quality best runs all" if job.options.tune else "no drift is made up for here"
    return [f"--drift-samples: {why}; left out"]


def _unmatched_rules(recipe: Recipe, plan: Plan) -> list[str]:
    """See `recipe.unmatched`."""
    everything = plan.linears if plan.head is None else (*plan.linears, plan.head)
    return unmatched(recipe, [(linear.name, linear.layer) for linear in everything])


def _without_calibration(request: Request, recipe: Recipe) -> tuple[Request, list[str]]:
    """Where no method calibrates, the request without what only calibration uses, and a note that names it."""
    if request.method != "rtn" or any(rule.method not in (None, "rtn") for rule in recipe.rules):
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


def _recorded(out: Path) -> dict[str, Any] | None:
    """quantkit.json of a finished run, if there is a sound one."""
    try:
        return read_result(out)
    except OutputError:
        return None


def _cost(result: Mapping[str, Any], seconds: float, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Time and memory; of a finished run that is only measured again, with those of the run."""
    if before is None:
        return {"seconds": seconds}
    peaks = {key: max(result[key], before.get(key) or 0) for key in ("peak_rss_bytes", "peak_device_bytes")}
    return {"seconds": seconds + (before.get("seconds") or 0)} | peaks


def _finished_before(
    job: Job, units: Sequence[Unit], memory: Mapping[str, Any], limits: Limits, recorded: Mapping[str, Any]
) -> bool:
    """Whether quantkit.json is that of this very run, brought to its end, with all that it is asked for."""
    files = {entry["name"]: entry["sha256"] for entry in recorded.get("files") or []}
    found = {unit.file: unit.sha256 for unit in units}  # which have just been looked at
    if not all((job.out / name).is_file() for name in (*files, "report.html", "README.md")):
        return False
    if files != found | {name: sha256_of(job.out / name) for name in files.keys() - found.keys()}:
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


def _too_large(memory: Mapping[str, Any], evaluated: TokenSet | None) -> str:
    so = "; the verdict will be FAIL" if evaluated else ""
    return (
        f"does not fit: {format_bytes(memory['total_bytes'])} with {memory['context']:,} tokens of context, of "
        f"{format_bytes(memory['budget_bytes'])}{so} (`quantkit fit` says what would fit)"
    )


def default_out(request: Request, scheme: Scheme, fmt: Format) -> Path:
    """outputs/<model>-<method>-w<bits>-g<group>[-<format>]."""
    usual = fmt.name == DEFAULT_FORMATS[request.method]
    label = _label(request.model)
    tail = "" if usual else f"-{fmt.name}"
    return Path("outputs") / f"{label}-{request.method}-w{scheme.bits}-g{scheme.group_size}{tail}"


def _label(model: str) -> str:
    """A model's name without what is before it."""
    name = Path(model).expanduser().resolve().name if Path(model).exists() else model
    return name.rpartition("/")[2]


def serving(request: Request, recipe: Recipe, model: Shapes) -> dict[str, Any]:
    """What the result is to be served with; see `defaults.choose_serving`."""
    return choose_serving(
        positions(model.config), recipe.budget, budget=request.budget, context=request.context, kv=request.kv
    )


def config_options(options: Options) -> dict[str, Any]:
    """What only some formats write down of how a method worked."""
    return {"damp_percent": options.damp, "desc_act": False, "static_groups": options.act_order}


def tokens_of(
    request: Request, recipe: Recipe, model: StreamedModel, directory: Path, methods: Collection[str | None]
) -> tuple[TokenSet | None, TokenSet | None]:
    """The calibration tokens, if one of the methods needs them, and the evaluation tokens, if it is to be verified."""
    said, limit = recipe.calibration, positions(model.config)
    seqlen = choose_seqlen(limit, request.seqlen, said.seqlen)
    samples = request.samples or said.samples or DEFAULT_SAMPLES
    vocabulary = model.config.vocab_size
    tokenizer = tokenizer_of(directory)
    calibrated = evaluated = None
    if any(method != "rtn" for method in methods):
        calibrated = calibration.load(
            request.calib or said.source or "mix",
            tokenizer,
            samples=samples,
            seqlen=seqlen,
            seed=request.seed,
            vocab_size=vocabulary,
            offline=request.offline,
        )
        calibrated = calibration.note_left_out(calibrated, samples=request.samples, seqlen=request.seqlen)
    if request.verify:
        evaluated = calibration.load_eval(
            request.evaluation or calibration.DEFAULT_EVAL,
            tokenizer,
            seqlen=seqlen,
            samples=request.eval_samples,
            vocab_size=vocabulary,
            offline=request.offline,
        )
        evaluated = calibration.note_left_out(evaluated, seqlen=request.seqlen)
    for tokens in (calibrated, evaluated):
        if tokens is not None:
            calibration.require_positions(tokens, limit)
    if evaluated is not None and evaluated.seqlen < 2:
        raise InputError(f"{evaluated.source}: windows of 1 token predict nothing; expected 2 or more")
    return calibrated, evaluated


def _announce(console: Console, request: Request, recipe: Recipe, job: Job, told: Sequence[str]) -> None:
    plan = job.plan
    schemes: dict[str, int] = {}
    for linear in plan.linears:
        label = str(linear.scheme) if linear.scheme else "16 bit"
        schemes[label] = schemes.get(label, 0) + 1
    shown = ", ".join(f"{count} linears {label}" for label, count in schemes.items())
    lines = [
        f"{request.method} {request.model} -> {job.out}  (stored as {plan.format.name}: {shown})",
        f"output {format_bytes(plan.served_bytes)}, {plan.bits_per_weight:.3f} bits per quantized "
        f"weight" + (f"; the same integers beside it in {format_bytes(plan.file_bytes)}" if plan.beside_bytes else ""),
    ]
    if job.ranks.size > 1:
        lines.append(f"{job.ranks.size} processes, each with its share of the samples and rows")
    for name, tokens in (("calibration", job.calibration), ("evaluation", job.evaluation)):
        if tokens is not None:
            lines.append(f"{name}: {tokens.source}, {tokens.samples} x {tokens.seqlen} tokens")
    for line in (*lines, *told):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if recipe.rules:
        console.print(recipe_table(resolved(plan, job.method)))


def _finish(job: Job, outcome: Outcome, directory: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write what engines and people read beside the shards."""
    out, plan = job.out, job.plan
    files = {unit.file: unit.sha256 for unit in outcome.units}
    weight_map = {name: shard.file for shard in plan.shards for name in shard.tensors}
    config = quantized_config(directory, plan.quantization_config)
    files |= write_beside(out, directory, weight_map, plan.tensor_bytes, config, plan.format)
    if plan.format is GGUF:
        exported = export(out, out / f"{out.resolve().name}.gguf", name=_label(result["model"]))
        files[exported.path.name] = exported.sha256
        result |= {"total_bytes": exported.nbytes, "tensor_bytes": plan.beside_bytes}  # what llama.cpp loads
        result["gguf"] = {
            "file": exported.path.name,
            "bytes": exported.nbytes,
            "types": sorted(set(exported.types.values())),
            "equal": exported.equal,
        }
    result["files"] = file_records(out, files)
    if result["verification"] is None:
        result["verification"] = _still_valid(out, result["files"])
    write_result(out, result)
    return result


def _still_valid(out: Path, files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The verification of an earlier pass over the same run, if it was of these very files."""
    try:
        recorded = read_result(out)
    except OutputError:  # none, or a damaged one, which is about to be replaced
        return None
    verification: dict[str, Any] | None = recorded["verification"]
    return verification if recorded.get("files") == files else None


def _document(
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
        "calibration": calibration.record_of(job.calibration),
        "layers": [record for unit in outcome.units for record in unit.record["linears"]],
        "bits_per_weight": plan.bits_per_weight,
        "total_bytes": plan.file_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "peak_rss_bytes": max(peak_rss_bytes(), *(rss for rss, _ in outcome.peaks)),
        "peak_device_bytes": max(device for _, device in outcome.peaks),
        "processes": len(outcome.peaks),
        "device": str(job.device),
        "versions": versions(),
        "fallbacks": [
            *outcome.fallbacks,
            *notes_of(job.calibration, job.evaluation),
            *_beyond(outcome, request.ram),
        ],
        "engines": memory["engines"],
        "verification": _verification(job, outcome, memory, limits),
    }


def limits_of(request: Request, recipe: Recipe) -> Limits:
    """The command line comes before the recipe, which comes before the defaults."""
    said = recipe.limits
    rise = [r for r in (request.max_ppl_increase, said.max_ppl_increase) if r is not None]
    kl = [k for k in (request.max_kl, said.max_kl) if k is not None]
    return Limits(rise[0] if rise else Limits.max_ppl_increase, kl[0] if kl else None)


def _verification(job: Job, outcome: Outcome, memory: dict[str, Any], limits: Limits) -> dict[str, Any] | None:
    if outcome.measured is None:
        return None
    return verification_block(outcome.measured, calibration.record_of(job.evaluation), limits, memory)


def _beyond(outcome: Outcome, ram: int | None) -> list[str]:
    peak = max(rss for rss, _ in outcome.peaks)
    return [f"RAM reached {format_bytes(peak)}, beyond --ram {format_bytes(ram)}"] if ram and peak > ram else []


def _continued(outcome: Outcome) -> list[str]:
    if not outcome.reused:
        return []
    return [f"continued: {outcome.reused} of {len(outcome.units)} files were there; time and memory are of this start"]


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
