# SPDX-License-Identifier: Apache-2.0
"""The picture of a sweep: KL against size."""

from collections.abc import Sequence

from quantkit.report import formatting
from quantkit.report.pages import charts
from quantkit.report.pages.parts import Chart, Result, Table
from quantkit.report.rendering import template

MIB, GIB = 2**20, 2**30


def render_sweep(sweep: Result) -> str:
    """One self-contained page: KL against size for the settings of a sweep, from the document sweep.json."""
    rows = [row for row in sweep["settings"] if row["why_not"] is None]
    refused = [row for row in sweep["settings"] if row["why_not"] is not None]
    calibration = sweep["calibration"]
    ran = [
        ("calibration", _tokens_line(calibration) if calibration else "none"),
        ("evaluation", _tokens_line(sweep["evaluation"])),
        ("perplexity of FP16", formatting.figure(sweep["perplexity_fp16"])),
        (
            "time",
            f"{formatting.duration(sweep['seconds'])}, {formatting.duration(sweep['shared_seconds'])} of it shared",
        ),
    ]
    return template("sweep.html.j2", escape=True).render(
        model=formatting.short_name(sweep["model"]),
        subtitle=f"{len(rows)} settings measured in one pass, {len(refused)} left out",
        chart=_sweep_chart(sweep, rows),
        settings=_sweep_table(sweep, rows),
        refused=Table(("setting", "why not"), [(row["name"], row["why_not"]) for row in refused], figures=False),
        note=sweep["note"],
        ran=Table(("", ""), ran, figures=False),
        command=sweep["command"],
    )


def _tokens_line(tokens: Result) -> str:
    return f"{tokens['source']}, {tokens['samples']} x {tokens['seqlen']} tokens"


def _setting_label(row: Result) -> str:
    return f"W{row['bits']} {'rows' if row['group_size'] == -1 else 'g' + str(row['group_size'])}"


def _sweep_chart(sweep: Result, rows: Sequence[Result]) -> Chart:
    unit, name = (GIB, "GiB") if max(row["total_bytes"] for row in rows) >= GIB else (MIB, "MiB")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = [(row, max(row["kl_divergence"], 1e-9)) for row in rows if row["kl_divergence"] is not None]
    marks = [
        charts.Mark(
            row["total_bytes"] / unit,
            kl,
            methods.index(row["method"]),
            _setting_label(row) if row["pareto"] else "",
            f"{row['name']}: {formatting.exact(row['total_bytes'])}, KL {kl:.4g}",
        )
        for row, kl in found
    ]
    room = rows[0]["total_bytes"] + sweep["budget"] - rows[0]["memory_bytes"]
    x = charts.near_axis(
        min(mark.x for mark in marks), max(mark.x for mark in marks), f"files of weights, {name}", "{:.4g}".format
    )
    y = charts.log_axis(min(mark.y for mark in marks), max(mark.y for mark in marks), "KL against FP16, nats")
    budget = (
        f"budget {formatting.size(sweep['budget'])} with {formatting.tokens(sweep['context'])} of context "
        f"({sweep['kv']}): "
        f"room for {formatting.size(room)} of weights"
    )
    inside = x.low <= room / unit <= x.high
    return Chart(
        "KL divergence against bytes",
        charts.scatter_chart(
            "KL divergence against bytes",
            marks,
            x,
            y,
            front=sorted((row["total_bytes"] / unit, kl) for row, kl in found if row["pareto"]),
            limit=room / unit,
        ),
        [(number, method) for number, method in enumerate(methods)],
        f"The line is the Pareto front: no other setting is both smaller and closer. The dashed line is the {budget}."
        if inside
        else f"The line is the Pareto front: no other setting is both smaller and closer. The {budget}.",
    )


def _sweep_table(sweep: Result, rows: Sequence[Result]) -> Table:
    """One row a setting; a star marks the front, dots the engines that load it."""
    engines = list(rows[0]["engines"])
    columns = ("setting (* front)", "size", "bits", "perplexity", "KL", "top-1", "time", "context", *engines)
    cells = [
        (
            row["name"] + (" *" if row["pareto"] else ""),
            formatting.size(row["total_bytes"]),
            f"{row['bits_per_weight']:.3f}",
            formatting.figure(row["perplexity"]),
            formatting.figure(row["kl_divergence"]),
            formatting.percent(row["top1_agreement"]),
            formatting.duration(row["seconds"]),
            formatting.tokens(row["longest_context"])
            if row["fits"]
            else f"{row['longest_context']:,} (too long asked)",
            *("●" if row["engines"][engine] is None else "" for engine in engines),
        )
        for row in sorted(rows, key=lambda row: row["total_bytes"])
    ]
    return Table(columns, cells)
