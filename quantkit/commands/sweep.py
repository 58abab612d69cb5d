# SPDX-License-Identifier: Apache-2.0
"""Many settings in one pass over the model: accuracy against size, before one of them is chosen.

Every layer is read once; the original runs through it once for the calibration tokens, whose Gram matrices serve all
settings, and once for the evaluation tokens; and each setting's own evaluation stream runs through its own rounding of
the layer. So every setting is calibrated on the inputs of the *original* model. A run with `--inputs original` gives
the same figures; a usual run calibrates on the quantized layers before, which is a little better and depends on the
setting, so it cannot be shared.

GPTQ's factor of a Gram matrix does not depend on bits or groups and is made once; AWQ's does, by its scales.

After each layer the streams are kept in the folder, and the journal says so: an interrupted sweep goes on there.
"""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from quantkit import __version__
from quantkit.calibration.tokens import TokenSet, notes_of, record_of
from quantkit.checkpoint.journal import Journal, Unit, open_journal
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.writer import require_disk, write_chunks, write_json, write_shard, write_text
from quantkit.dtypes import to_stored
from quantkit.errors import InputError, SchemeError
from quantkit.hardware.machine import peak_rss_bytes, return_freed_memory, versions
from quantkit.methods import gptq
from quantkit.methods.table import METHODS
from quantkit.model.families import Site
from quantkit.model.sites import sites_of
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embedding_names,
    move_buffers,
    open_model,
    outside_loaded,
    read_layer,
    read_outside,
)
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import (
    Progress,
    advance,
    compare_all,
    embed_tokens,
    ending_names,
    loaded,
    observe,
    open_states,
)
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import quantize_observed
from quantkit.pipeline.memory import Layout, keep, lay_out_job
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.report.pages.sweep import render_sweep
from quantkit.report.terminal.progress import display
from quantkit.results.folder import require_another
from quantkit.serving.fit import fit
from quantkit.settings.defaults import choose_format, choose_scheme, find_model
from quantkit.settings.request import Request, config_options, serving
from quantkit.settings.tokens import tokens_of
from quantkit.stats import SiteStats
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


@dataclass(frozen=True)
class Setting:
    """One setting that can be: its name, how it would be run, and its document without the figures."""

    name: str
    job: Job
    document: dict[str, Any]


def sweep(request: SweepRequest, console: Console) -> dict[str, Any]:
    """Measure every setting, and leave sweep.json, sweep.csv, sweep.html and, with matplotlib, sweep.png.

    Raises:
        QuantkitError: anything the user can fix; a setting that cannot be is listed, and an error when none can.
    """
    run = request.run
    directory = find_model(run.model, offline=run.offline)
    out = run.out or Path("outputs") / f"{Path(run.model).name}-sweep"
    require_another(out, directory)
    model = open_model(directory)
    recipe = Recipe()
    serve = serving(run, recipe, model)
    calibrated, evaluated = tokens_of(run, recipe, model, model.directory, set(request.methods))
    assert evaluated is not None
    settings, refused = settings_of(request, model, serve, calibrated, evaluated, out)
    if not settings:
        raise InputError(f"no setting of the sweep can be: {refused[0]['name']}: {refused[0]['why_not']}")
    if not any(setting.document["fits"] for setting in settings):
        told = f"no setting fits {format_bytes(serve['budget'])} with {serve['context']:,} tokens of context"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    for row in refused:
        console.print(f"left out: {row['name']}: {row['why_not']}", highlight=False, markup=False, soft_wrap=True)
    console.print(SHARED_INPUTS, highlight=False, soft_wrap=True)
    notes = notes_of(calibrated, evaluated)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    streams = [(evaluated.samples, evaluated.seqlen)] * (1 + len(settings))
    layout = lay_out_job(settings[0].job, streams, vram=run.vram, ram=run.ram, place=run.place, keeps=False)
    console.print(f"memory: {layout}", highlight=False, markup=False, soft_wrap=True)
    keep(layout, run.device)
    identity = settings[0].job.identity() | {
        "sweep": [setting.name for setting in settings],
        "evaluation": evaluated.sha256,
    }
    for key in ("method", "format", "scheme"):
        del identity[key]
    with open_journal(out, identity, fresh=run.fresh) as journal:
        with display(console, run.device) as progress:
            figures, shared = _measure(model, settings, calibrated, evaluated, layout, journal, progress)
        rows = [s.document | figure for s, figure in zip(settings, figures, strict=True)]
        result = {
            "quantkit_version": __version__,
            "command": run.command,
            "model": run.model,
            "inputs": "original",
            "note": SHARED_INPUTS,
            "calibration": record_of(calibrated),
            "evaluation": record_of(evaluated),
            **serve,
            "weights_16bit": fit(model, settings[0].job.plan, **serve)["weights_16bit"],
            "perplexity_fp16": rows[0]["perplexity_fp16"],
            "settings": [*_with_front(rows), *refused],
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
            draw(result, out / "sweep.png")
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
                scheme = choose_scheme(method, Recipe(), bits, group, run.symmetric)
                fmt = choose_format(run.format, method, scheme, Recipe())
                name = f"{method} {scheme}" + ("" if fmt.name == METHODS[method].format else f" {fmt.name}")
                document = {
                    "name": name,
                    "method": method,
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "symmetric": scheme.symmetric,
                    "format": fmt.name,
                }
                try:
                    plan = make_plan(model, lambda n, layer, s=scheme: s, fmt, **config_options(run.options))  # type: ignore[misc]
                except SchemeError as error:
                    refused.append(document | {"why_not": str(error)})
                    continue
                memory = fit(model, plan, **serve)
                document |= {
                    "why_not": None,
                    "total_bytes": plan.served_bytes,
                    "bits_per_weight": plan.bits_per_weight,
                    "fits": memory["fits"],
                    "memory_bytes": memory["total_bytes"],
                    "longest_context": memory["longest_context"],
                    "engines": memory["engines"],
                }
                job = Job(
                    model,
                    plan,
                    method,
                    run.options,
                    calibrated,
                    evaluated,
                    out,
                    run.device,
                    run.place,
                    inputs="original",
                )
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


# ---------------------------------------------------------------- the pass


@torch.no_grad()
def _measure(
    model: StreamedModel,
    settings: Sequence[Setting],
    calibrated: TokenSet | None,
    evaluated: TokenSet,
    layout: Layout,
    journal: Journal,
    progress: Progress,
) -> tuple[list[dict[str, Any]], float]:
    """One row of figures for each setting, and the seconds that all of them share."""
    job = settings[0].job
    device, dtype, out = job.device, job.dtype, job.out
    done = journal.finished.get("figures")
    if done is not None:
        _forget_states(out)
        return list(done.record["figures"]), float(done.record["shared_seconds"])
    sites = sites_of(model)
    move_buffers(model.model, device)
    tokens: dict[str, TokenSet] = {"original": evaluated} | {str(i): evaluated for i in range(len(settings))}
    if calibrated is not None:
        tokens["calibration"] = calibrated
    room = sum(t.input_ids.numel() for t in tokens.values()) * model.config.hidden_size * dtype.itemsize
    require_disk(out, 2 * room)
    streams = {
        name: open_states(model, each, dtype, device, out / f".{name}-states.tmp", layout.place, layout.batch)
        for name, each in tokens.items()
    }
    progress.start(len(model.layers), sum(t.input_ids.numel() for t in tokens.values()), {"all streams": layout.place})
    outside = read_outside(model, embedding_names(model))
    as_files = {name: to_stored(name, tensor) for name, tensor in outside.items()}
    for original, tensors in ((True, outside), (False, as_files)):  # also learns what layers are called with
        with outside_loaded(model, loaded(tensors, device, dtype)):
            for name, stream in streams.items():
                if original == (name in ("original", "calibration")):
                    embed_tokens(model, tokens[name], stream, device)
    first, seconds, shared = _resume(journal, streams, len(settings))
    for index in range(first, len(model.layers)):
        began = time.monotonic()
        layer = model.layers[index]
        progress.layer(index)
        progress.stage("run the original")
        source = read_layer(model, index)
        assign(layer, loaded(source, device, dtype))
        stats = observe(model, index, sites, streams["calibration"]) if calibrated is not None else ()
        advance(model, index, streams["original"])
        factors = _factors(settings, stats)
        shared += time.monotonic() - began
        worst = 0.0
        for number, setting in enumerate(settings):
            began = time.monotonic()
            progress.stage(setting.name)
            own, given = _own(setting.job, sites, stats, factors)
            written, records = quantize_observed(setting.job, index, sites, own, given, source, progress)
            assign(layer, loaded(written, device, dtype))
            advance(model, index, streams[str(number)])
            seconds[number] += time.monotonic() - began
            worst = max([worst, *(record["loss"] for record in records)])
        del stats, factors, source
        drop(layer)
        return_freed_memory()
        began = time.monotonic()
        _keep(journal, index, streams, seconds, shared)
        shared += time.monotonic() - began
        progress.finished(index, worst, False)
    began = time.monotonic()
    progress.ending("compare the logits")
    ending = read_outside(model, ending_names(model))
    stored = ((name, to_stored(name, tensor)) for name, tensor in ending.items())
    own_streams = [streams[str(number)] for number in range(len(settings))]
    figures = compare_all(
        model, evaluated, streams["original"], own_streams, loaded(ending, device, dtype), stored, device
    )
    shared += time.monotonic() - began
    rows = [figure | {"seconds": took} for figure, took in zip(figures, seconds, strict=True)]
    sha256 = write_json(out / "figures.json", rows)
    journal.append(Unit("figures", "figures.json", sha256, {"figures": rows, "shared_seconds": shared}))
    _forget_states(out)
    return rows, shared


def _factors(settings: Sequence[Setting], stats: Sequence[SiteStats]) -> list[gptq.Factor | None]:
    """GPTQ's factor of each site's Gram matrix, if a setting has a use for it."""
    options = settings[0].job.options
    if not any(METHODS[setting.job.method].shares_factor for setting in settings):
        return [None] * len(stats)
    return [gptq.factorize(each.gram, damp=options.damp, act_order=options.act_order) for each in stats]


def _own(
    job: Job, sites: Sequence[Site], stats: Sequence[SiteStats], factors: Sequence[gptq.Factor | None]
) -> tuple[Sequence[SiteStats | None], Sequence[gptq.Factor | None]]:
    """What a setting may have of the shared statistics: AWQ rescales its Gram matrices in place."""
    if not METHODS[job.method].calibrates:
        return [None] * len(sites), [None] * len(sites)
    if METHODS[job.method].shares_factor:
        return stats, factors
    return [replace(each, gram=each.gram.clone()) for each in stats], [None] * len(sites)


def _keep(journal: Journal, index: int, streams: Mapping[str, Stream], seconds: Sequence[float], shared: float) -> None:
    """Keep the streams behind a layer, and then forget those behind layers before."""
    name = f"states-{index}.safetensors"
    sha256 = write_shard(journal.folder / name, {key: stream.states.cpu() for key, stream in streams.items()})
    record = {"seconds": list(seconds), "shared_seconds": shared}
    journal.append(Unit(f"layer.{index}", name, sha256, record))
    _forget_states(journal.folder, but=name)


def _forget_states(folder: Path, but: str = "") -> None:
    """Remove kept streams, those too that an interrupted sweep had no time to remove."""
    for path in folder.glob("states-*.safetensors"):
        if path.name != but:
            path.unlink()


def _resume(journal: Journal, streams: Mapping[str, Stream], settings: int) -> tuple[int, list[float], float]:
    """Fill the streams from the last layer that is kept: (the layer to go on with, seconds of each setting, shared)."""
    layers = [unit for unit in journal.finished.values() if unit.unit.startswith("layer.")]
    if not layers:
        return 0, [0.0] * settings, 0.0
    last = layers[-1]
    if not journal.verify_unit(last):
        journal.drop_from("layer.0")
        return 0, [0.0] * settings, 0.0
    kept = open_file(journal.folder / last.file)
    for name, stream in streams.items():
        states: Tensor = kept.read(name)
        stream.states.copy_(states)
    return len(layers), list(last.record["seconds"]), float(last.record["shared_seconds"])


# ---------------------------------------------------------------- what is shown

COLUMNS = (
    "name",
    "method",
    "bits",
    "group_size",
    "symmetric",
    "format",
    "total_bytes",
    "bits_per_weight",
    "perplexity",
    "kl_divergence",
    "top1_agreement",
    "seconds",
    "longest_context",
    "fits",
    "pareto",
    "loads",
    "why_not",
)


def loads(row: Mapping[str, Any]) -> str:
    """The engines that load a setting."""
    return " ".join(engine for engine, reason in (row.get("engines") or {}).items() if reason is None)


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The settings as CSV, one line each; those that cannot be have only their reason."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) | {"loads": loads(row)} for row in rows)
    return text.getvalue()


def draw(result: Mapping[str, Any], path: Path) -> None:
    """KL against size as a PNG: the methods, the Pareto front, and the most that weights may take of the budget."""
    from matplotlib.figure import Figure

    rows = [row for row in result["settings"] if row["why_not"] is None]
    unit, name = (2**30, "GiB") if max(row["total_bytes"] for row in rows) >= 2**30 else (2**20, "MiB")
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osD^v", strict=False):
        own = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["total_bytes"] / unit for row in own],
            [row["kl_divergence"] for row in own],
            marker=marker,
            s=46,
            label=method,
            zorder=3,
        )
    front = sorted((row["total_bytes"] / unit, row["kl_divergence"], row) for row in rows if row["pareto"])
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="0.45", linewidth=1, label="Pareto front")
    for number, (x, y, row) in enumerate(front):
        label = f"W{row['bits']} {'rows' if row['group_size'] == -1 else 'g' + str(row['group_size'])}"
        below = -14 - 9 * (number % 2)
        axes.annotate(label, (x, y), (0, below), textcoords="offset points", fontsize=8, ha="center")
    room = rows[0]["total_bytes"] + result["budget"] - rows[0]["memory_bytes"]
    low, high = axes.get_xlim()
    if low <= room / unit <= high:
        axes.axvline(room / unit, color="tab:red", linestyle="--", label=f"room in {format_bytes(result['budget'])}")
    axes.margins(0.08, 0.12)
    axes.set(yscale="log", xlabel=f"files of weights, {name}", ylabel="KL against FP16, nats", title=result["model"])
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_chunks(path, [image.getvalue()])
