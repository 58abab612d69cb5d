# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack, solved exactly: one entry for each part, least value in sum, costs within a budget.

An integer program for HiGHS (scipy.optimize.milp): binary x[part, entry], sum over entries of x = 1, sum of cost x <=
budget, least sum of value x. Costs are integers, and the answer is checked in integers: the solver works in floats.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

SPREAD = 1e5  # values are scaled to reach this: the solver stops at an absolute gap of 1e-6


def solve(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The number of the entry of each part, or None when not even the cheapest fit.

    values, costs: [part][entry], at least one entry each; of equal answers any.
    """
    cheapest = [min(row) for row in costs]
    room = budget - sum(cheapest)
    if room < 0:
        return None
    extra = [[cost - least for cost in row] for row, least in zip(costs, cheapest, strict=True)]
    unit = gcd(*(cost for row in extra for cost in row)) or 1
    candidates = [_undominated(v, c) for v, c in zip(values, extra, strict=True)]
    limit = room // unit
    while True:
        chosen = _solve(values, [[cost // unit for cost in row] for row in extra], candidates, limit)
        over = sum(row[entry] for row, entry in zip(extra, chosen, strict=True)) - room
        if over <= 0:
            return chosen
        limit -= -(-over // unit)  # within the solver's tolerance, but not within the budget


def _undominated(values: Sequence[float], costs: Sequence[int]) -> list[int]:
    """The entries that no other beats in both: of rising cost and falling value."""
    best: list[int] = []
    for entry in sorted(range(len(values)), key=lambda i: (costs[i], values[i])):
        if not best or values[entry] < values[best[-1]]:
            best.append(entry)
    return best


def _solve(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]], limit: int
) -> list[int]:
    pairs = [(part, entry) for part, entries in enumerate(candidates) for entry in entries]
    lowest = [min(values[part][entry] for entry in entries) for part, entries in enumerate(candidates)]
    value = np.array([values[part][entry] - lowest[part] for part, entry in pairs])
    cost = np.array([costs[part][entry] for part, entry in pairs], dtype=float)
    scale = max(limit, 1)
    parts = len(candidates)
    rows = [part for part, _ in pairs] + [parts] * len(pairs)
    columns = [*range(len(pairs))] * 2
    matrix = csr_array((np.concatenate([np.ones(len(pairs)), cost / scale]), (rows, columns)))
    low, high = np.append(np.ones(parts), -np.inf), np.append(np.ones(parts), limit / scale)
    with _stdout_to_stderr():
        result = milp(
            value * (SPREAD / max(float(value.max()), 1e-300)),
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.ones(len(pairs), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise RuntimeError(f"the solver result no answer where there is one: {result.message}")
    share = np.full((parts, max(map(len, costs))), -1.0)
    for (part, entry), x in zip(pairs, result.x, strict=True):
        share[part, entry] = x
    return [int(entry) for entry in share.argmax(1)]


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """The HiGHS of scipy 1.17 prints what it tries, from C++; stdout may be for one JSON document."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
