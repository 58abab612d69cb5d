# SPDX-License-Identifier: Apache-2.0
"""What commands print when they are done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantkit.hub import PushResult
from quantkit.units import format_bytes, format_seconds


def summary(result: dict[str, Any], out: Path) -> Group:
    """What was made, how close it is to FP16, whether it fits, and where to look."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    scheme = result["scheme"]
    kind = "symmetric" if scheme["symmetric"] else "asymmetric"
    table.add_row("scheme", f"{scheme['bits']} bits, groups of {scheme['group_size']}, {kind}, as {result['format']}")
    table.add_row(
        "size", f"{format_bytes(result['total_bytes'])}, {result['bits_per_weight']:.3f} bits per quantized weight"
    )
    measured = result["verification"]
    if measured:
        _add_figures(table, measured)
    table.add_row(
        "took", f"{format_seconds(result['seconds'])}, at most {format_bytes(result['peak_rss_bytes'])} of RAM"
    )
    lines: list[Any] = [table]
    lines += [Text(f"fallback: {note}", style="yellow") for note in result["fallbacks"]]
    if measured:
        lines += _verdict_lines(measured)
    lines.append(Text(f"report: {out}/report.html"))
    return Group(*lines)


def verify_summary(result: dict[str, Any], out: Path) -> Group:
    """What a look at the files has found, and where the report is if there is one."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "size",
        f"{format_bytes(result['total_bytes'])}, {result['bits_per_weight']:.3f} bits per quantized weight, "
        f"as {result['format']}",
    )
    measured = result["verification"]
    _add_figures(table, measured)
    evaluated = measured["eval"]
    table.add_row("evaluated on", f"{evaluated['source']}, {evaluated['samples']} x {evaluated['seqlen']} tokens")
    lines: list[Any] = [table]
    lines += [Text(f"note: {note}", style="yellow") for note in evaluated["notes"]]
    lines += _verdict_lines(measured)
    if "files" in result:
        lines.append(Text(f"report: {out}/report.html"))
    return Group(*lines)


def convert_summary(result: dict[str, Any], out: Path) -> Group:
    """What became of the integers, how large it is, what is known of its accuracy, and where it is."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    converted = result["converted"]
    table.add_row("linears", f"{converted['equal']} with equal codes, scales and zero points, read back from the files")
    if converted["rounded"]:
        error = converted["weight_error"]
        how = f"{converted['rounded']} rounded, relative error of the weights {error['mean']:.2%}"
        table.add_row("", f"{how} (at worst {error['worst']:.2%})")
    table.add_row("size", f"{format_bytes(result['total_bytes'])}, as {result['format']}")
    measured = result["verification"]
    if measured:
        _add_figures(table, measured)
    lines: list[Any] = [table, *(Text(f"note: {note}", style="yellow") for note in result["fallbacks"])]
    if measured:
        lines += _verdict_lines(measured)
    lines.append(Text(f"report: {out}/report.html"))
    return Group(*lines)


def _add_figures(table: Table, measured: dict[str, Any]) -> None:
    """Rows of a verification; a figure that could not be measured, or is not finite, is None and left out."""
    found, reference = measured["perplexity"], measured["perplexity_fp16"]
    if found is not None and reference is not None:
        table.add_row("perplexity", f"{found:.4f}  (FP16 {reference:.4f}, {found / reference - 1:+.2%})")
    if measured["kl_divergence"] is not None:
        table.add_row(
            "KL divergence",
            f"{measured['kl_divergence']:.5f} nats over {measured['tokens']:,} tokens{_dtype(measured)}",
        )
    if measured["top1_agreement"] is not None:
        table.add_row("top-1 agreement", f"{measured['top1_agreement']:.2%}")
    fit = measured.get("fit")
    if fit:
        table.add_row(
            "memory",
            f"{format_bytes(fit['total_bytes'])} of {format_bytes(fit['budget_bytes'])} with {fit['context']:,} "
            f"tokens of context; longest that fits {fit['longest_context']:,}",
        )


def _dtype(measured: dict[str, Any]) -> str:
    """What hidden states and weights were computed in."""
    return f", in {measured['dtype']}" if measured.get("dtype") else ""


def _verdict_lines(measured: dict[str, Any]) -> list[Text]:
    passed = measured["verdict"] == "pass"
    shown = Text("PASS" if passed else "FAIL", style="bold green" if passed else "bold red")
    return [shown, *(Text(f"  {reason}") for reason in measured["reasons"])]


@contextmanager
def upload_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of bytes sent; calls are (file just finished, bytes so far, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("upload", visible=False)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name or "upload", completed=done, total=total, visible=True)

        yield show


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
