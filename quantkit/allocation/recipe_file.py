# SPDX-License-Identifier: Apache-2.0
"""What is told of an allocation: its document, and the recipe file with the reasons as comments."""

import json
import re
from collections.abc import Mapping
from typing import Any

from quantkit.allocation.menu import HEAD, Entry, Part, entry_name
from quantkit.allocation.problem import Choice, Problem
from quantkit.allocation.table import Table, total
from quantkit.calibration.tokens import TokenSet
from quantkit.plan import number_ranges
from quantkit.settings.request import Request

MADE_BY = "# to run: quantkit"  # in every recipe that is written here


def document_of(problem: Problem, choice: Choice, table: Table, ratio: float) -> dict[str, Any]:
    """What is told of an allocation; ratio: of the evaluation text's KL to that of the windows that decide."""
    plan = problem.plan(choice)
    uniform = []
    for entry in dict.fromkeys(entry for row in problem.menu.values() for entry in row):
        if entry is not None and all(entry in row for part, row in problem.menu.items() if part != HEAD):
            alike = {part: None if part == HEAD else entry for part in problem.parts}
            size = problem.plan(alike).served_bytes
            kl = total(table, alike) * ratio
            uniform.append({"entry": entry_name(entry), "total_bytes": size, "predicted_kl": kl})
    memory = problem.fit(plan)
    return {
        "predicted_kl": total(table, choice) * ratio,
        "total_bytes": plan.served_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "budget_bytes": problem.budget.nbytes,
        "counted_bytes": problem.size(plan),
        "longest_context": memory.longest_context,
        "engines": memory.engines,
        "uniform": uniform,
        "parts": [
            {
                "layer": part[0],
                "linears": [linear.local for linear in problem.parts[part]],
                "entry": entry_name(entry),
                "predicted_kl": table[part][entry] * ratio,
                "bytes": problem.cost(part, entry),
            }
            for part, entry in choice.items()
        ],
    }


def recipe_text(
    problem: Problem, choice: Choice, table: Table, document: Mapping[str, Any], run: Request, tokens: TokenSet
) -> str:
    """The recipe file. Its default is the most common scheme; tokens: what has calibrated."""
    schemes = [entry for part, entry in choice.items() if entry is not None and part != HEAD]
    default = max(dict.fromkeys(schemes), key=schemes.count)
    serve, weights_only = problem.budget.serve, problem.budget.weights_only
    counted = "files of weights" if weights_only else f"{serve['context']} tokens of {serve['kv']} cache counted"
    checked = ""
    if "checked_kl" in document:
        checked = f"; measured as a whole: {document['checked_kl']:.5f} on windows kept from calibration"
    lines = [
        f"# {document['total_bytes']:,} bytes of weights, {document['bits_per_weight']:.3f} bits per weight; budget "
        f"{problem.budget.nbytes:,} bytes ({counted})",
        f"# expected KL {document['predicted_kl']:.5f} nats{checked}",
        *(
            f"# uniform {u['entry']}: {u['total_bytes']:,} bytes, expected KL {u['predicted_kl']:.5f}"
            for u in document["uniform"]
        ),
        *(f"# {engine}: {why or 'loads it'}" for engine, why in document["engines"].items()),
        f"{MADE_BY} {run.method} {run.model} --recipe THIS --format {problem.fmt.name}",
        f"default: {{{_scheme(default)}}}",
        _calibration_line(run, tokens),
    ]
    if not weights_only:
        lines.append(f"budget: {{memory: {problem.budget.nbytes}B, context: {serve['context']}, kv: {serve['kv']}}}")
    rules = _rules(problem, choice, table, default)
    if rules:
        lines.append("rules: # the KL that each layer's part adds, and what the next smaller entry would add")
    return "\n".join([*lines, *(rules or ["rules: []"])]) + "\n"


def _rules(problem: Problem, choice: Choice, table: Table, default: Entry) -> list[str]:
    groups: dict[tuple[int, Entry], list[int]] = {}
    for (layer, number), entry in choice.items():
        if entry != default and (layer, number) != HEAD:
            groups.setdefault((number, entry), []).append(layer)
    lines = []
    for (number, entry), layers in sorted(groups.items(), key=lambda item: (item[0][0], item[1])):
        names = "|".join(re.escape(linear.local) for linear in problem.parts[layers[0], number]).replace("\\", "\\\\")
        lines += [
            "  # " + "; ".join(_reason(problem, table, (layer, number), entry) for layer in layers),
            f'  - {{match: "re:.*[.]({names})", layers: "{number_ranges(layers)}", {_scheme(entry)}}}',
        ]
    if choice.get(HEAD) is not None:
        reason = _reason(problem, table, HEAD, choice[HEAD])
        lines += [f"  # {reason}", f"  - {{kind: lm_head, {_scheme(choice[HEAD])}}}"]
    return lines


def _scheme(entry: Entry) -> str:
    if entry is None:
        return "keep: 16bit"
    return f"bits: {entry.bits}, group_size: {entry.group_size}, symmetric: {'true' if entry.symmetric else 'false'}"


def _reason(problem: Problem, table: Table, part: Part, entry: Entry) -> str:
    smaller = [e for e in problem.menu[part] if problem.cost(part, e) < problem.cost(part, entry)]
    text = f"{'lm_head' if part == HEAD else f'layer {part[0]}'}: {table[part][entry]:.2g}"
    if not smaller:
        return text
    below = max(smaller, key=lambda e: problem.cost(part, e))
    return f"{text} ({entry_name(below)} {table[part][below]:.2g})"


def _calibration_line(run: Request, tokens: TokenSet) -> str:
    source = f"source: {json.dumps(str(run.calib), ensure_ascii=False)}, " if run.calib else ""
    return f"calibration: {{{source}samples: {tokens.samples}, seqlen: {tokens.seqlen}}}"
