# SPDX-License-Identifier: Apache-2.0
"""Many settings in one pass over the model: accuracy against size, before one of them is chosen.

`pipeline.sweep` measures. Every setting is calibrated on the inputs of the *original* model. A run with `--inputs
original` gives the same figures; a usual run calibrates on the quantized layers before, which is a little better and
depends on the setting, so it cannot be shared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.tokens import TokenSet, notes_of, record_of
from quantkit.checkpoint.journal import open_journal
from quantkit.checkpoint.writer import write_chunks, write_json, write_text
from quantkit.errors import InputError, SchemeError
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.methods.table import METHODS
from quantkit.model.opening import open_planned
from quantkit.model.streaming import StreamedModel
from quantkit.pipeline.job import Job
from quantkit.pipeline.memory import Allowance, keep, lay_out_job
from quantkit.pipeline.runtime import Runtime
from quantkit.pipeline.sweep import Setting, measure_settings
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, resolver
from quantkit.report.pages.sweep import csv_of, picture_of, render_sweep
from quantkit.report.terminal.screen import Terminal
from quantkit.results.folder import require_another
from quantkit.serving.fit import fit
from quantkit.settings.advice import best_of
from quantkit.settings.defaults import AskedScheme, choose_format, choose_scheme, find_source
from quantkit.settings.request import Request, config_options, serving
from quantkit.settings.tokens import tokens_of
from quantkit.units import format_bytes

SHARED_INPUTS = (
    "calibrated on the original's inputs: equal to runs with --inputs original; usual runs calibrate on the quantized "
    "layers before and differ a little"
)


@dataclass(frozen=True)
class SweepRequest:
    """run: calibration, evaluation, budget, device, and `out`, the folder; every method x bits x group is a setting."""

    run: Request
    methods: tuple[str, ...]
    bits: tuple[int, ...]
    groups: tuple[int, ...]


def sweep(request: SweepRequest, terminal: Terminal) -> dict[str, Any]:
    """Measure every setting, and leave sweep.json, sweep.csv, sweep.html and, with matplotlib, sweep.png.

    Raises:
        QuantkitError: anything the user can fix; a setting that cannot be is listed, and an error when none can.
    """
    run = request.run
    source = find_source(run.model, offline=run.offline)
    out = run.out or Path("outputs") / f"{Path(run.model).name}-sweep"
    require_another(out, source.directory)
    recipe = Recipe()
    model, serve = open_planned(source, lambda model: serving(run, recipe, model))
    calibrated, evaluated = tokens_of(run, recipe, model, model.directory, set(request.methods))
    assert evaluated is not None
    settings, refused = settings_of(request, model, serve, calibrated, evaluated, out)
    if not settings:
        raise InputError(f"No setting of this sweep can be quantized: {refused[0]['name']}: {refused[0]['why_not']}")
    if not any(setting.document["fits"] for setting in settings):
        line = f"no setting fits {format_bytes(serve['budget'])} with {serve['context']:,} tokens of context"
        terminal.say(line)
    for row in refused:
        terminal.say(f"left out: {row['name']}: {row['why_not']}")
    terminal.say(SHARED_INPUTS)
    notes = notes_of(calibrated, evaluated)
    for note in notes:
        terminal.say(f"note: {note}")
    streams = [(evaluated.samples, evaluated.seqlen)] * (1 + len(settings))
    runtime = settings[0].job.runtime
    allowance = Allowance(run.vram, run.ram, run.place)
    layout = lay_out_job(settings[0].job, streams, allowance, keeps=False)
    terminal.say(f"memory: {layout}")
    keep(layout, run.device)
    identity = settings[0].job.identity() | {
        "sweep": [setting.name for setting in settings],
        "evaluation": evaluated.sha256,
    }
    for key in ("method", "format", "scheme"):
        del identity[key]
    with open_journal(out, identity, fresh=run.fresh) as journal:
        with terminal.progress(run.device) as progress:
            figures, shared = measure_settings(replace(runtime, memory=layout.memory), settings, journal, progress)
        rows = [s.document | figure for s, figure in zip(settings, figures, strict=True)]
        result = {
            "quantkit_version": __version__,
            "command": run.command,
            "model": run.model,
            "inputs": "original",
            "note": SHARED_INPUTS,
            "calibration": (tokens := record_of(calibrated)) and tokens.content(),
            "evaluation": (tokens := record_of(evaluated)) and tokens.content(),
            **serve,
            "weights_16bit": fit(model, settings[0].job.plan, **serve).weights_16bit,
            "perplexity_fp16": rows[0]["perplexity_fp16"],
            "settings": [*_with_front(rows), *refused],
            "best": best_of(rows, run.command),
            "shared_seconds": shared,
            "seconds": shared + sum(row["seconds"] for row in rows),
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
            "fallbacks": notes
            + ([] if find_spec("matplotlib") else ["sweep.png: matplotlib is not installed (extra: plots)"]),
        }
        write_json(out / "sweep.json", result)
        write_text(out / "sweep.csv", csv_of(result["settings"]))
        write_text(out / "sweep.html", render_sweep(result))
        if find_spec("matplotlib"):
            write_chunks(out / "sweep.png", [picture_of(result)])
    return result | {"out": str(out)}


def settings_of(
    request: SweepRequest,
    model: StreamedModel,
    serve: Mapping[str, Any],
    calibrated: TokenSet | None,
    evaluated: TokenSet,
    out: Path,
) -> tuple[list[Setting], list[dict[str, Any]]]:
    """The settings that can be, and a row with the reason for each that cannot."""
    run = request.run
    settings, refused = [], []
    for method in request.methods:
        for bits in request.bits:
            for group in request.groups:
                scheme = choose_scheme(method, Recipe(), AskedScheme(bits, group, run.symmetric))
                fmt = choose_format(run.format, method, scheme, Recipe())
                name = f"{method} {scheme}" + ("" if fmt.name == METHODS[method].formats[0] else f" {fmt.name}")
                document = {
                    "name": name,
                    "method": method,
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "symmetric": scheme.symmetric,
                    "format": fmt.name,
                }
                try:
                    resolve = resolver(Recipe(), scheme, model.family.sixteen_bit)
                    plan = make_plan(model, resolve, fmt, **config_options(run.options))
                except SchemeError as error:
                    refused.append(document | {"why_not": str(error)})
                    continue
                memory = fit(model, plan, **serve)
                document |= {
                    "why_not": None,
                    "total_bytes": plan.served_bytes,
                    "bits_per_weight": plan.bits_per_weight,
                    "fits": memory.fits,
                    "memory_bytes": memory.total_bytes,
                    "longest_context": memory.longest_context,
                    "engines": memory.engines,
                }
                runtime = Runtime(model, run.device, out)
                job = Job(runtime, plan, method, run.options, calibrated, evaluated, inputs="original")
                settings.append(Setting(name, job, document))
    return settings, refused


def _with_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark the rows that no other beats in both bytes and KL."""
    return [
        row
        | {
            "pareto": not any(
                other["total_bytes"] <= row["total_bytes"]
                and other["kl_divergence"] <= row["kl_divergence"]
                and (other["total_bytes"], other["kl_divergence"]) != (row["total_bytes"], row["kl_divergence"])
                for other in rows
            )
        }
        for row in rows
    ]
