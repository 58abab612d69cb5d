# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
        rise = measured["perplexity"] / measured["perplexity_fp16"] - 1
        table.add_row(
            "perplexity", f"{measured['perplexity']:.4f}  (FP16 {measured['perplexity_fp16']:.4f}, {rise:+.2%})"
        )
        table.add_row("KL divergence", f"{measured['kl_divergence']:.5f} nats over {measured['tokens']:,} tokens")
        table.add_row("top-1 agreement", f"{measured['top1_agreement']:.2%}")
        fit = measured.get("fit")
        if fit:
            table.add_row(
                "memory",
                f"{format_bytes(fit['total_bytes'])} of {format_bytes(fit['budget_bytes'])} with {fit['context']:,} tokens "
                f"of context; longest that fits {fit['longest_context']:,}",
            )
    table.add_row(
        "took", f"{format_seconds(result['seconds'])}, at most {format_bytes(result['peak_rss_bytes'])} of RAM"
    )
    lines: list[Any] = [table]
    lines += [Text(f"fallback: {note}", style="yellow") for note in result["fallbacks"]]
    if measured:
        passed = measured["verdict"] == "pass"
        lines.append(Text("PASS" if passed else "FAIL", style="bold green" if passed else "bold red"))
        lines += [Text(f"  {reason}") for reason in measured["reasons"]]
    lines.append(Text(f"report: {out}/report.html"))
    return Group(*lines)
