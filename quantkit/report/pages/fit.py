# SPDX-License-Identifier: Apache-2.0
"""The picture of `fit`: memory against context, and what it is made of."""

from collections.abc import Mapping

from quantkit.records import Fit
from quantkit.report import formatting
from quantkit.report.pages.parts import Table, memory
from quantkit.report.rendering import template


def render_fit(fit: Fit, model: str, subtitle: str) -> str:
    """One self-contained page: memory against context."""
    chart, parts, longest = memory(fit)
    cards, problems = fit.tensor_parallel.cards, fit.tensor_parallel.problems
    verdict = f"Cannot be cut over {cards} cards" if problems else "Fits" if fit.fits else "Does not fit"
    engines = [[engine, reason or "loads it"] for engine, reason in fit.engines.items()]
    return template("fit.html.j2", escape=True).render(
        model=formatting.short_name(model),
        subtitle=subtitle,
        good=fit.fits and not problems,
        verdict=verdict,
        problems=problems,
        longest=longest,
        room=_room(fit),
        chart=chart,
        parts=parts,
        weights=_sizes("kind", fit.weights),
        workspace=_sizes("part", fit.workspace),
        workspace_note=_workspace_note(fit),
        flags=" ".join(fit.engine.flags) if fit.engine else "",
        needs=_needs(fit),
        engines=Table(["", ""], engines, figures=False),
    )


def _room(fit: Fit) -> str:
    """The budget, and how much of it is left, in a sentence."""
    spare = f"{formatting.size(abs(fit.margin_bytes))} {'left' if fit.margin_bytes >= 0 else 'too much'}"
    context = f"{formatting.tokens(fit.context)} tokens of context ({fit.kv})"
    return f"{spare} of the budget of {formatting.size(fit.budget_bytes)}, with {context}."


def _sizes(name: str, sizes: Mapping[str, int]) -> Table:
    rows = [[kind.replace("_", " "), formatting.size(size), f"{size:,}"] for kind, size in sizes.items() if size]
    return Table([name, "size", "bytes"], rows)


def _workspace_note(fit: Fit) -> str:
    """What the workspace is counted for."""
    if fit.engine is None:
        return ""
    engine, model = fit.engine, fit.model
    return (
        f"Counted for {engine.name} {engine.version}, a batch of {model['prefill_tokens']:,} tokens and "
        f"{model['sequences']} sequences; {engine.source}."
    )


def _needs(fit: Fit) -> Table | None:
    """What quantizing will need; None for what is quantized already."""
    if fit.ram_bytes is None:
        return None
    hidden = formatting.size(fit.hidden_states_bytes)
    rows = [
        ("RAM", f"{formatting.size(fit.ram_bytes)} at most, on a CPU"),
        ("GPU memory", f"{formatting.size(fit.device_bytes)} at most, with --device cuda"),
        (
            "disk",
            f"{formatting.size(fit.disk_bytes)}, and {hidden} of hidden states a stream if not in RAM",
        ),
    ]
    return Table(["", ""], rows, figures=False)
