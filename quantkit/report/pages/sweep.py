# SPDX-License-Identifier: Apache-2.0
"""A sweep as a page, a picture and a table: KL against size."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from quantkit.report import formatting
from quantkit.report.pages import charts
from quantkit.report.pages.parts import Chart, Result, Table
from quantkit.report.rendering import template

MIB, GIB = 2**20, 2**30
LABEL_WIDTH, LABEL_HEIGHT = 110, 26  # pixels of the PNG


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
        best=sweep.get("best"),
        budget=formatting.size(sweep["budget"]),
        context=formatting.tokens(sweep["context"]),
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
    measured = [(row, max(row["kl_divergence"], 1e-9)) for row in rows if row["kl_divergence"] is not None]
    marks = [
        charts.Mark(
            row["total_bytes"] / unit,
            kl,
            methods.index(row["method"]),
            _setting_label(row) if row["pareto"] else "",
            f"{row['name']}: {formatting.exact(row['total_bytes'])}, KL {kl:.4g}",
        )
        for row, kl in measured
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
            front=sorted((row["total_bytes"] / unit, kl) for row, kl in measured if row["pareto"]),
            limit=room / unit,
        ),
        [(charts.colour(number), method) for number, method in enumerate(methods)],
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


def loads(row: Result) -> str:
    """The engines that load a setting."""
    return " ".join(engine for engine, reason in (row.get("engines") or {}).items() if reason is None)


def csv_of(rows: Sequence[Result]) -> str:
    """The settings as CSV, one line each; those that cannot be have only their reason."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) | {"loads": loads(row)} for row in rows)
    return text.getvalue()


def picture_of(result: Result) -> bytes:
    """KL against size as a PNG, with the page's colours: the methods, the Pareto front, and the room in the budget."""
    from matplotlib.figure import Figure

    rows = [row for row in result["settings"] if row["why_not"] is None and row["kl_divergence"] is not None]
    unit, name = (GIB, "GiB") if max(row["total_bytes"] for row in rows) >= GIB else (MIB, "MiB")
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, method in zip(charts.COLOURS, dict.fromkeys(row["method"] for row in rows), strict=False):
        own = [row for row in rows if row["method"] == method]
        sizes, losses = [row["total_bytes"] / unit for row in own], [row["kl_divergence"] for row in own]
        axes.scatter(sizes, losses, color=colour, s=40, label=method, zorder=3)
    front = sorted((row["total_bytes"] / unit, row["kl_divergence"], row) for row in rows if row["pareto"])
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="0.45", linewidth=1, label="Pareto front")
    room = rows[0]["total_bytes"] + result["budget"] - rows[0]["memory_bytes"]
    low, high = axes.get_xlim()
    if low <= room / unit <= high:
        label = f"room in {formatting.size(result['budget'])}"
        axes.axvline(room / unit, color=charts.COLOURS[3], linestyle="--", label=label)
    axes.margins(0.12, 0.12)
    headline = f"best within the budget: {best['name']}" if (best := result.get("best")) else "nothing fits the budget"
    axes.set(yscale="log", xlabel=f"files of weights, {name}", ylabel="KL against FP16, nats")
    axes.set_title(f"{formatting.short_name(result['model'])}: {headline}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(frameon=False)
    figure.draw_without_rendering()  # now the axes know where points are
    taken: list[tuple[float, float]] = []
    for x, y, row in front:  # left of the line and below it there is no setting
        across, up = axes.transData.transform((x, y))
        if not any(abs(across - other) < LABEL_WIDTH and abs(up - at) < LABEL_HEIGHT for other, at in taken):
            taken.append((across, up))
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 9}
            axes.annotate(_setting_label(row), (x, y), (-5, -6), **place)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
