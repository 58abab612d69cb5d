# SPDX-License-Identifier: Apache-2.0
"""What `quantkit inspect` prints."""

from rich.console import Group
from rich.table import Table

from quantkit.plan import number_ranges
from quantkit.records import Foreign, Linear, Result
from quantkit.units import format_bytes


def inspect_table(result: Result | Foreign) -> Group:
    """Per kind of linear and scheme: how many, bits, group, method, bytes, mean and worst error; then the totals."""
    table = Table("linears", "layers", "bits", "group", "zero point", "method", "bytes", "error", "worst", box=None)
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for layer in result.layers:
        groups.setdefault((layer.kind, layer.scheme, layer.method), []).append(layer)
    for members in groups.values():
        first = members[0]
        losses = [member.loss for member in members if member.loss is not None]
        table.add_row(
            first.kind,
            number_ranges([member.layer for member in members if member.layer >= 0]),
            str(first.bits),
            "rows" if first.group_size == -1 else str(first.group_size),
            "middle" if first.symmetric else "per group",
            first.method or "",
            format_bytes(sum(member.bytes for member in members)),
            f"{sum(losses) / len(losses):.3%}" if losses else "",
            f"{max(losses):.3%}" if losses else "",
        )
    return Group(table, _totals(result))


def _totals(result: Result | Foreign) -> Table:
    totals = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    totals.add_row("model", result.model)
    totals.add_row("format", result.format)
    totals.add_row(
        "size", f"{format_bytes(result.total_bytes)}, {result.bits_per_weight:.3f} bits per quantized weight"
    )
    if isinstance(result, Foreign):
        if result.kept:
            totals.add_row("in 16 bit", ", ".join(result.kept[:4]) + (" ..." if len(result.kept) > 4 else ""))
        if result.act_order:
            totals.add_row("act-order", "columns that share a scale are not side by side (desc_act)")
        totals.add_row("made by", result.made_by)
        return totals
    if measured := result.verification:
        kl = measured.kl_divergence
        figure = "not measured" if kl is None else f"{kl:.5f} nats"
        totals.add_row("KL divergence", f"{figure}, verdict {measured.verdict} when it was measured")
    if source := result.converted:
        totals.add_row("converted from", f"{source.from_format}, made by {source.made_by}: {source.origin}")
    totals.add_row("made by", f"quantkit {result.quantkit_version}: {result.command}")
    return totals
