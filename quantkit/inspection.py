# SPDX-License-Identifier: Apache-2.0
"""What a finished folder says of itself."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from quantkit.errors import OutputError
from quantkit.units import format_bytes

RESULT = "quantkit.json"


def read_result(out: Path) -> dict[str, Any]:
    """The result document of a finished run.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    path = out / RESULT
    if not path.is_file():
        state = (
            "unfinished; run its command again" if (out / "journal.jsonl").is_file() else "not a folder of quantkit's"
        )
        raise OutputError(f"{out}: no {RESULT} ({state})")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(document, dict) or "layers" not in document:
        raise OutputError(f"{path}: not a result of quantkit")
    return document


def inspect_table(result: dict[str, Any]) -> Group:
    """Per kind of linear and scheme: how many, bits, group, method, bytes, mean and worst error; then the totals."""
    table = Table("linears", "layers", "bits", "group", "zero point", "method", "bytes", "error", "worst", box=None)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in result["layers"]:
        key = (layer["kind"], layer["bits"], layer["group_size"], layer["symmetric"], layer["method"])
        groups.setdefault(key, []).append(layer)
    for (kind, bits, group, symmetric, method), members in groups.items():
        losses = [member["loss"] for member in members]
        table.add_row(
            kind,
            _ranges(sorted(member["layer"] for member in members)),
            str(bits),
            "rows" if group == -1 else str(group),
            "middle" if symmetric else "per group",
            method,
            format_bytes(sum(member["bytes"] for member in members)),
            f"{sum(losses) / len(losses):.3%}",
            f"{max(losses):.3%}",
        )
    totals = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    totals.add_row("model", str(result["model"]))
    totals.add_row("format", str(result["format"]))
    totals.add_row(
        "size", f"{format_bytes(result['total_bytes'])}, {result['bits_per_weight']:.3f} bits per quantized weight"
    )
    if result.get("verification"):
        measured = result["verification"]
        kl = measured["kl_divergence"]
        figure = "not measured" if kl is None else f"{kl:.5f} nats"
        totals.add_row("KL divergence", f"{figure}, verdict {measured['verdict']}")
    totals.add_row("made by", f"quantkit {result['quantkit_version']}: {result['command']}")
    return Group(table, totals)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)
