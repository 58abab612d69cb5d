# SPDX-License-Identifier: Apache-2.0
"""The KL that each part adds at each entry, from what was measured; and the choice of least sum within the bytes."""

import math
from collections.abc import Mapping, Sequence

from quantkit.allocation.knapsack import solve
from quantkit.allocation.menu import HEAD, Entry, Part
from quantkit.allocation.problem import Choice, Problem
from quantkit.allocation.sensitivity import Measured, Swap

Table = dict[Part, dict[Entry, float]]

LEAST_SHARE = 0.01


def is_probed(problem: Problem, part: Part, every: int) -> bool:
    """Whether the part lies in one of the layers that are swapped in, each n-th and the last, or is the head."""
    return part == HEAD or part[0] % every == 0 or part[0] == len(problem.shapes.layer_linears) - 1


def probe_entries(problem: Problem, every: int) -> list[Swap]:
    """Which part to swap to what: the entry whose bits per weight are nearest to what the budget allows on average."""
    smallest = problem.smallest()
    room = problem.budget.nbytes - problem.size(problem.plan(smallest))
    least_bytes = sum(problem.cost(part, entry) for part, entry in smallest.items())
    whole = {part: problem.cost(part, None) for part in problem.parts}
    share = (least_bytes + room) / sum(whole.values())

    swaps: list[Swap] = []
    for part, entries in problem.menu.items():
        schemes = [entry for entry in entries if entry is not None]
        if schemes and is_probed(problem, part, every):
            away = [abs(problem.cost(part, entry) / whole[part] - share) for entry in schemes]
            swaps.append((part, schemes[away.index(min(away))]))
    return swaps


def table_of(problem: Problem, measured: Measured) -> Table:
    """KL by part and entry: each part's losses times what a unit of loss does to the logits."""
    slope = {
        part: kl / measured.losses[part][entry]
        for (part, entry), kl in measured.swapped.items()
        if measured.losses[part][entry] > 0
    }
    return {
        part: {entry: measured.losses[part][entry] * _interpolated(slope, part) for entry in entries}
        for part, entries in problem.menu.items()
    }


def corrected(table: Table, checked: Measured, choice: Mapping[Part, Entry]) -> Table:
    """The table at the allocation: what each part really adds there, with the other parts quantized too.

    The parts' own shares of the measured KL do not sum up to it exactly; what is left over is spread over them. A share
    may come out as nothing or less: no part is believed to matter less than a hundredth of what the table says.
    """
    alone = {part: checked.kl - checked.swapped[part, None] for part in choice if (part, None) in checked.swapped}
    factors_there = {
        part: max(fall, LEAST_SHARE * table[part][choice[part]]) / table[part][choice[part]]
        for part, fall in alone.items()
        if table[part][choice[part]] > 0
    }
    factors = {part: _interpolated(factors_there, part) or 1.0 for part in choice}
    raised = {part: {entry: kl * factors[part] for entry, kl in row.items()} for part, row in table.items()}
    return scaled(raised, choice, checked.kl)


def scaled(table: Table, choice: Mapping[Part, Entry], kl: float) -> Table:
    """The table with its sum at a choice brought to what was measured there."""
    expected = total(table, choice)
    factor = kl / expected if expected > 0 else 1.0
    return {part: {entry: factor * value for entry, value in row.items()} for part, row in table.items()}


def total(table: Table, choice: Mapping[Part, Entry]) -> float:
    """The KL that is expected of a choice: the sum of its parts."""
    return sum(table[part][entry] for part, entry in choice.items())


def _interpolated(slope: Mapping[Part, float], part: Part) -> float:
    """The slope of a part, geometrically between the nearest probed layers of its kind; 0 where nothing is known."""
    if part in slope:
        return slope[part]
    layer, kind = part
    below = max((at for at, k in slope if k == kind and at < layer), default=None)
    above = min((at for at, k in slope if k == kind and at > layer), default=None)
    if below is None or above is None:
        nearest = below if below is not None else above
        return 0.0 if nearest is None else slope[nearest, kind]
    share = (layer - below) / (above - below)
    low, high = (max(slope[at, kind], 1e-30) for at in (below, above))
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def choose(problem: Problem, table: Table) -> Choice | None:
    """The entries of least summed KL within the budget, in exact bytes; None when nothing fits."""
    parts = list(problem.menu)
    values = [[table[part][entry] for entry in problem.menu[part]] for part in parts]
    costs = [[problem.cost(part, entry) for entry in problem.menu[part]] for part in parts]

    def choice(chosen: Sequence[int]) -> Choice:
        return {part: problem.menu[part][i] for part, i in zip(parts, chosen, strict=True)}

    def header_bytes(chosen: Sequence[int], size: int) -> int:
        return size - sum(row[i] for row, i in zip(costs, chosen, strict=True))

    cheapest = [min(range(len(row)), key=row.__getitem__) for row in costs]
    headers = header_bytes(cheapest, problem.size(problem.plan(choice(cheapest))))
    best: Choice | None = None
    tested: set[int] = set()
    while headers not in tested:  # what is not tensors depends a little on the choice: the lengths of headers
        tested.add(headers)
        chosen = solve(values, costs, problem.budget.nbytes - headers)
        if chosen is None:
            break
        candidate = choice(chosen)
        size = problem.size(problem.plan(candidate))
        if size <= problem.budget.nbytes and (best is None or total(table, candidate) < total(table, best)):
            best = candidate
        headers = header_bytes(chosen, size)
    return best
