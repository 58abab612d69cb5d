# SPDX-License-Identifier: Apache-2.0
"""What pages are made of, and the part that two of them share: memory against context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from quantkit.records import Fit
from quantkit.report import formatting
from quantkit.report.pages import charts

TOTAL = "total"  # the row of a table that is set in bold
Result = Mapping[str, Any]


class Card(NamedTuple):
    """A key figure: its name, the figure, and a line below it."""

    name: str
    value: str
    note: str = ""


class Chart(NamedTuple):
    """A chart with its heading, a legend of (CSS colour, name), and a line on how to read it."""

    heading: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""


class Table(NamedTuple):
    """Rows of text below column names; columns from the second on hold figures if `figures`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = True


def memory(fit: Fit) -> tuple[Chart, Table, str]:
    """The chart, the parts at the context asked for, and a sentence."""
    card = fit.tensor_parallel
    weights, workspace = card.weights_bytes, card.workspace_bytes
    parts: list[tuple[str, Callable[[int], float]]] = [
        ("weights", lambda _: weights),
        ("workspace", lambda _: workspace),
        ("KV cache", lambda context: formatting.cache_bytes(fit, context)),
    ]
    budget, longest, asked = fit.budget_bytes, fit.longest_context, fit.context
    chart = Chart(
        "By part",
        charts.memory_chart(
            parts,
            budget=budget,
            longest=longest,
            asked=asked,
            allowed=fit.max_position_embeddings,
            bends=[x.window for x in fit.kv_layers if x.window],
        ),
        [(charts.colour(i), name) for i, (name, _) in enumerate(parts)],
        "Stacked from below; the dashed line is the budget, the ring the context asked for, the dot the longest "
        "that fits.",
    )
    rows = [
        ["weights", formatting.size(weights)],
        ["workspace of the engine", formatting.size(workspace)],
        [f"KV cache, {asked:,} tokens ({fit.kv})", formatting.size(card.kv_bytes)],
        [TOTAL, formatting.size(fit.total_bytes)],
        ["budget", formatting.size(budget)],
    ]
    spare = budget - fit.total_bytes
    rows.append(["left" if spare >= 0 else "over the budget by", formatting.size(abs(spare))])
    rows.append(["KV cache per token", formatting.exact(card.kv_bytes_per_token)])
    cards = card.cards
    return chart, Table(["part" if cards == 1 else f"on each of {cards} cards", "bytes"], rows), _longest(fit)


def _longest(fit: Fit) -> str:
    """The longest context, in a sentence."""
    longest = fit.longest_context
    if longest <= 0:
        return "No context fits: weights and workspace alone exceed the budget."
    if longest == fit.max_position_embeddings:
        return f"All {longest:,} tokens that the model allows fit."
    return f"The longest context that fits is {longest:,} tokens."
