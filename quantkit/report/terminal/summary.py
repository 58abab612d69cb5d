# SPDX-License-Identifier: Apache-2.0
"""What commands print when they are done."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantkit.hub.push import PushResult
from quantkit.records import Foreign, RecipeRow, Result, Verification
from quantkit.settings.advice import next_step, usage
from quantkit.units import format_bytes, format_seconds


def summary(result: Result, out: Path) -> Group:
    """What was made, how close it is to FP16, whether it fits, and where to look."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("scheme", f"{_schemes(result)}, as {result.format}")
    table.add_row("size", _size(result))
    if result.verification:
        _add_figures(table, result.verification)
    table.add_row(
        "took", f"{format_seconds(result.seconds or 0)}, at most {format_bytes(result.peak_rss_bytes or 0)} of RAM"
    )
    lines: list[Any] = [table]
    lines += [Text(f"note: {note}", style="yellow") for note in result.fallbacks]
    if result.verification:
        lines += [*_verdict_lines(result.verification), *_next_step(result, out)]
    return Group(*lines, *_ending(result, out))


def _size(result: Result | Foreign) -> str:
    return f"{format_bytes(result.total_bytes)}, {result.bits_per_weight:.3f} bits per quantized weight"


def _schemes(result: Result) -> str:
    """The one scheme; of several, how many linears have each."""
    found = Counter(row.scheme_name for row in result.layers)
    if len(found) < 2:
        return next(iter(found), result.scheme.scheme_name)
    return "mixed: " + ", ".join(f"{count} x {name}" for name, count in found.most_common())


def recipe_table(rows: Sequence[RecipeRow]) -> Table:
    """What a recipe comes to: see `plan.resolved`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("kind", "layers", "scheme", "method"):
        table.add_column(heading)
    table.add_column("size", justify="right")
    for row in rows:
        table.add_row(row.kind, row.layers, row.scheme_name, row.method or "", format_bytes(row.bytes))
    return table


def catalogue_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What `settings.models.catalogue` lists."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    table.add_column("model", overflow="fold")  # names to copy, so none is cut
    table.add_column("here")
    table.add_column("what it is")
    for row in rows:
        table.add_row(row["name"], row["model"], "yes" if row["path"] else "no", row["description"])
    return table


def sweep_summary(result: Mapping[str, Any]) -> Group:
    """The settings of a sweep by size; * marks those that no other beats in both size and KL."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("setting")
    for heading in ("size", "bits", "ppl", "KL", "top-1", "time", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in")
    rows = [row for row in result["settings"] if row["why_not"] is None]
    marks: dict[str, str] = {}  # a list of engines in every row would leave a terminal no room for the figures
    for row in sorted(rows, key=lambda row: row["total_bytes"]):
        engines = ", ".join(engine for engine, reason in row["engines"].items() if reason is None)
        table.add_row(
            row["name"] + (" *" if row["pareto"] else ""),
            format_bytes(row["total_bytes"]),
            f"{row['bits_per_weight']:.3f}",
            _figure(row["perplexity"], ".4f"),
            _figure(row["kl_divergence"], ".5f"),
            _figure(row["top1_agreement"], ".2%"),
            format_seconds(row["seconds"]),
            f"{row['longest_context']:,}",
            marks.setdefault(engines or "no engine known", f"({len(marks) + 1})"),
        )
    refused = [row for row in result["settings"] if row["why_not"] is not None]
    key = Text("*: nothing of its size or less has a lower KL; context: the longest that fits the budget")
    lines: list[Any] = [table, key, *(Text(f"{mark} loads in {engines}") for engines, mark in marks.items())]
    lines += [*(Text(f"{row['name']}: {row['why_not']}", style="yellow") for row in refused)]
    lines += [Text(note, style="yellow") for note in result["fallbacks"]]
    if best := result["best"]:
        lines.append(
            Text(f"best within the budget: {best['name']}, KL {best['kl']}, {best['size']}", style="bold green")
        )
        lines.append(Text(f"  {best['command']}", "yellow", no_wrap=True, overflow="ignore"))
    shared = format_seconds(result["shared_seconds"])
    lines.append(Text(f"took {format_seconds(result['seconds'])}, {shared} of it shared by all; {result['note']}"))
    lines.append(Text(f"pictures and tables: {result['out']}/sweep.html, sweep.json, sweep.csv"))
    return Group(*lines)


def _figure(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)


def allocate_summary(result: Mapping[str, Any]) -> Group:
    """What was chosen for each part of each layer, what it is expected to cost, and beside it the uniform choices."""
    kinds = list(dict.fromkeys("/".join(_short(part["linears"])) for part in result["parts"]))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layer", *kinds):
        table.add_column(heading)
    rows: dict[int, dict[str, str]] = {}
    for part in result["parts"]:
        rows.setdefault(part["layer"], {})["/".join(_short(part["linears"]))] = part["entry"]
    for layer, row in rows.items():
        table.add_row(str(layer) if layer >= 0 else "", *(row.get(kind, "") for kind in kinds))
    lines: list[Any] = [table]
    lines += [
        f"uniform {uniform['entry']}: {uniform['total_bytes']:,} bytes, expected KL {uniform['predicted_kl']:.5f}"
        for uniform in result["uniform"]
    ]
    lines.append(
        f"chosen: {result['total_bytes']:,} bytes of weights ({result['counted_bytes']:,} of "
        f"{result['budget_bytes']:,} counted), {result['bits_per_weight']:.3f} bits per weight, "
        f"expected KL {result['predicted_kl']:.5f}"
    )
    if "checked_kl" in result:
        lines.append(
            f"checked: KL {result['checked_kl']:.5f} on windows kept from calibration, where the parts of the first "
            f"choice came to {result['predicted_by_sum']:.5f}; {result['mended']} parts changed by it"
        )
    lines += [f"{engine}: {why or 'loads it'}" for engine, why in result["engines"].items()]
    run = result.get("run")
    if run and run["verification"]:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        measured = Verification.model_validate(run["verification"])
        _add_figures(table, measured)
        lines += [table, *_verdict_lines(measured), f"repairs: {len(run['repairs'])}"]
    lines.append(f"recipe: {result['recipe']}" + (f"; checkpoint: {run['out']}" if run else ""))
    return Group(*(line if isinstance(line, Table) else Text(str(line)) for line in lines))


def _short(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[2].removesuffix("_proj") for name in names]


def verify_summary(result: Result | Foreign, out: Path) -> Group:
    """What a look at the files has found, and where the report is if there is one."""
    measured = result.verification
    assert measured is not None
    assert measured.eval is not None
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("size", f"{_size(result)}, as {result.format}")
    _add_figures(table, measured)
    evaluated = measured.eval
    table.add_row("evaluated on", f"{evaluated.source}, {evaluated.samples} x {evaluated.seqlen} tokens")
    lines: list[Any] = [table]
    lines += [Text(f"note: {note}", style="yellow") for note in evaluated.notes]
    lines += [*_verdict_lines(measured), *_next_step(result, out)]
    return Group(*lines, *_ending(result, out))


def convert_summary(result: Result, out: Path) -> Group:
    """What became of the integers, how large it is, what is known of its accuracy, and where it is."""
    converted, measured = result.converted, result.verification
    assert converted is not None
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("linears", f"{converted.equal} with equal codes, scales and zero points, read back from the files")
    if (error := converted.weight_error) is not None:
        how = f"{converted.rounded} rounded, relative error of the weights {error.mean or 0:.2%}"
        table.add_row("", f"{how} (at worst {error.worst or 0:.2%})")
    table.add_row("size", f"{format_bytes(result.total_bytes)}, as {result.format}")
    if measured:
        _add_figures(table, measured)
    lines: list[Any] = [table, *(Text(f"note: {note}", style="yellow") for note in result.fallbacks)]
    if measured:
        lines += _verdict_lines(measured)
    return Group(*lines, *_ending(result, out))


def _add_figures(table: Table, measured: Verification) -> None:
    """Rows of a verification; a figure that could not be measured, or is not finite, is None and left out."""
    if measured.increase is not None:
        limit = measured.limits.max_ppl_increase
        allowed = "" if limit is None else f"; the limit is +{limit * 100:g}%"
        found, reference = measured.perplexity, measured.perplexity_fp16
        table.add_row("perplexity", f"{found:.4f}  (FP16 {reference:.4f}, {measured.increase:+.2%}{allowed})")
    if measured.kl_divergence is not None:
        error = measured.kl_standard_error
        give_or_take = "" if error is None else f" ± {error:.5f}"
        computed = f", in {measured.dtype}" if measured.dtype else ""
        table.add_row(
            "KL divergence",
            f"{measured.kl_divergence:.5f}{give_or_take} nats over {measured.tokens:,} tokens{computed}",
        )
    if measured.top1_agreement is not None:
        table.add_row("top-1 agreement", f"{measured.top1_agreement:.2%}")
    if fit := measured.fit:
        table.add_row(
            "memory",
            f"{format_bytes(fit.total_bytes)} of {format_bytes(fit.budget_bytes)} with {fit.context:,} "
            f"tokens of context; longest that fits {fit.longest_context:,}",
        )


def _verdict_lines(measured: Verification) -> list[Text]:
    passed = measured.verdict == "pass"
    shown = Text("PASS" if passed else "FAIL", style="bold green" if passed else "bold red")
    return [shown, *(Text(f"  {reason}") for reason in measured.reasons)]


def _ending(result: Result | Foreign, out: Path) -> list[Text]:
    """Where the report is, and what to do with the folder."""
    lines = [f"{what}: {command}" for what, command in usage(result, str(out))]
    if isinstance(result, Result):
        lines.insert(0, f"report: {out}/report.html")
    return [Text(line, no_wrap=True, overflow="ignore") for line in lines]


def _next_step(result: Result | Foreign, out: Path) -> list[Text]:
    # A command that is cut into lines cannot be copied.
    return [Text(f"  {line}", "yellow", no_wrap=True, overflow="ignore") for line in next_step(result, str(out))]


def push_document(result: PushResult) -> dict[str, Any]:
    """What a push did, as JSON."""
    return {
        "repo_id": result.repo_id,
        "revision": result.revision,
        "url": result.url,
        "dry_run": result.dry_run,
        "commit": result.commit,
        "total_bytes": result.total_bytes,
        "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in result.files],
        "sent": list(result.sent),
        "left_out": list(result.left_out),
        "others": list(result.others),
        "forced": list(result.reasons),
    }


def push_summary(result: PushResult) -> Group:
    """The files and sizes of a push, and where they are, or would be."""
    table = Table("file", "size", box=None, padding=(0, 2, 0, 0))
    for file in result.files:
        table.add_row(file.name, format_bytes(file.bytes))
    lines: list[Any] = [table]
    lines += [Text(f"stays here: {name}", style="dim") for name in result.left_out]
    lines += [Text(f"already on the hub, not of this checkpoint: {name}", style="yellow") for name in result.others]
    lines += [Text(f"forced although {reason}", style="yellow") for reason in result.reasons]
    what = "would go" if result.dry_run else "went"
    lines.append(Text(f"{len(result.files)} files, {format_bytes(result.total_bytes)}, {what} to {result.url}"))
    return Group(*lines)
