# SPDX-License-Identifier: Apache-2.0
"""What `quantkit doctor` prints."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantkit.records import Fit
from quantkit.units import format_bytes

STYLE: dict[str, Any] = {"box": None, "title_justify": "left", "show_header": False, "padding": (0, 2, 0, 0)}


def doctor_table(found: dict[str, Any]) -> Group:
    """The document of `doctor` for a terminal."""
    machine = found["machine"]
    here = _table("this machine")
    card = machine["card"]
    gpu = "none is seen"
    if card:
        free = format_bytes(card["free_bytes"])
        gpu = f"{card['name']}, {format_bytes(card['memory_bytes'])}, {free} free, capability {card['capability']}"
    for name, value in (
        ("python", f"{machine['python']} on {machine['system']}, {machine['cpus']} CPUs"),
        ("GPU", gpu),
        ("driver", machine["driver"] or "none"),
        ("RAM", f"{format_bytes(machine['ram_bytes'])}, {format_bytes(machine['ram_free_bytes'])} free"),
        ("disk", f"{format_bytes(machine['disk_free_bytes'])} free here"),
    ):
        here.add_row(name, value)
    installed = _table("installed")
    programs = {f"{name} (program)": path for name, path in machine["programs"].items()}
    rows = {"quantkit": found["quantkit"], **machine["packages"], **programs}
    for name, value in rows.items():
        installed.add_row(name, Text(value, style="green") if value else Text("no", style="dim"))
    parts: list[Any] = [here, installed]
    if found.get("fit"):
        parts.append(_folder(found["folder"], Fit.model_validate(found["fit"]), found.get("kernels", {})))
    parts += [Text(f"problem: {problem}", style="red") for problem in found.get("problems", [])]
    for trouble in found["troubles"]:
        parts.append(Text(f"{trouble['symptom']}? {trouble['why']}"))
        parts.append(Text(f"  {trouble['command']}", no_wrap=True, overflow="ignore"))  # to be copied, so not cut
    return Group(*parts)


def _folder(name: str, fit: Fit, kernels: dict[str, dict[str, str]]) -> Table:
    folder = _table(name)
    word = "fits" if fit.fits else "does not fit"
    size = f"{format_bytes(fit.total_bytes)} of {format_bytes(fit.budget_bytes)}"
    folder.add_row("memory", f"{word}: {size} at {fit.context:,} tokens; longest context {fit.longest_context:,}")
    if fit.engine and fit.engine.flags:
        folder.add_row(f"flags of {fit.engine.name}", " ".join(fit.engine.flags))
    for engine, reason in fit.engines.items():
        taken = sorted(set(kernels.get(engine, {}).values()))
        folder.add_row(engine, reason or f"loads it{': ' + ', '.join(taken) if taken else ''}")
    return folder


def _table(title: str) -> Table:
    table = Table(title=title, **STYLE)
    for _ in range(3):
        table.add_column(overflow="fold")
    return table
