# SPDX-License-Identifier: Apache-2.0
"""The picture of `fit`: memory against context, and what it is made of."""

from collections.abc import Mapping

from quantkit.records import Fit
from quantkit.report import formatting
from quantkit.report.pages.parts import Result, Table, memory
from quantkit.report.rendering import template


def render_fit(fit: Result, model: str, subtitle: str) -> str:
    """One self-contained page: memory against context, from the document of `fit.fit`."""
    chart, parts, longest = memory(Fit.model_validate(fit))
    cards, problems = fit["tensor_parallel"]["cards"], fit["tensor_parallel"]["problems"]
    verdict = f"Cannot be cut over {cards} cards" if problems else "Fits" if fit["fits"] else "Does not fit"
    engines = [[engine, reason or "loads it"] for engine, reason in fit["engines"].items()]
    return template("fit.html.j2", escape=True).render(
        model=formatting.short_name(model),
        subtitle=subtitle,
        good=fit["fits"] and not problems,
        verdict=verdict,
        problems=problems,
        longest=longest,
        chart=chart,
        parts=parts,
        weights=_sizes("kind", fit["weights"]),
        workspace=_sizes("part", fit["workspace"]),
        workspace_note=_workspace_note(fit["model"]),
        needs=_needs(fit),
        engines=Table(["", ""], engines, figures=False),
    )


def _sizes(name: str, sizes: Mapping[str, int]) -> Table:
    rows = [[kind.replace("_", " "), formatting.size(size), f"{size:,}"] for kind, size in sizes.items() if size]
    return Table([name, "size", "bytes"], rows)


def _workspace_note(model: Result) -> str:
    """What the workspace is counted for: the constants of `fit`."""
    return (
        f"Counted for a prefill of {model['prefill_tokens']:,} tokens at once and {model['sequences']} sequence. "
        "What an engine takes for itself (context, libraries, graphs) is an allowance, not a measurement."
    )


def _needs(fit: Result) -> Table | None:
    """What quantizing will need; None for what is quantized already."""
    if "ram_bytes" not in fit:
        return None
    hidden = formatting.size(fit["hidden_states_bytes"])
    rows = [
        ("RAM", f"{formatting.size(fit['ram_bytes'])} at most, on a CPU"),
        ("GPU memory", f"{formatting.size(fit['device_bytes'])} at most, with --device cuda"),
        (
            "disk",
            f"{formatting.size(fit['disk_bytes'])}, and {hidden} of hidden states a stream if RAM does not hold them",
        ),
    ]
    return Table(["", ""], rows, figures=False)
