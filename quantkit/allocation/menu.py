# SPDX-License-Identifier: Apache-2.0
"""What a part of a model may become: entries such as W4g128, and which of them its linears and an engine can be."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit.errors import InputError
from quantkit.formats import Format
from quantkit.plan import OUTSIDE, LinearPlan
from quantkit.recipe import BITS
from quantkit.scheme import Scheme
from quantkit.serving.engines import LOADERS, Heads, why_not

Part = tuple[int, int]  # the layer, and the number of the site within it
HEAD: Part = (OUTSIDE, OUTSIDE)  # no site of a layer: nothing is interpolated from it
Entry = Scheme | None  # None: 16 bit
Parts = Mapping[Part, Sequence[LinearPlan]]

DEFAULT_MENU = "W2g128,W3rows,W3g256,W3g128,W3g64,W4rows,W4g256,W4g128,W4g64,W4g32,W5g128,W6g128,W8g128,16bit"
ENGINES = (*LOADERS, "any")


def parse_menu(text: str, symmetric: bool) -> tuple[Entry, ...]:
    """Read "W3g128,W4rows,16bit" into schemes; None is 16 bit.

    Raises:
        InputError: an entry that cannot be.
    """
    entries: list[Entry] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"[wW](\d+)(?:g(\d+)|(rows))", word)
        if word.lower() == "16bit":
            entries.append(None)
        elif match and int(match[1]) in BITS:
            entries.append(Scheme(int(match[1]), -1 if match[3] else int(match[2]), symmetric))
        else:
            raise InputError(f"--menu: expected entries such as W4g128, W4rows or 16bit, got {word!r}")
    if not entries:
        raise InputError("--menu: expected at least one entry such as W4g128")
    return tuple(dict.fromkeys(entries))


def entry_name(entry: Entry) -> str:
    """The menu's word for an entry."""
    if entry is None:
        return "16bit"
    return f"W{entry.bits}{'rows' if entry.group_size == -1 else f'g{entry.group_size}'}"


def entries_by_part(
    parts: Parts, menu: Sequence[Entry], fmt: Format, engine: str, heads: Heads
) -> tuple[dict[Part, tuple[Entry, ...]], list[str]]:
    """What of the menu each part can be, and one line for each entry that falls away somewhere.

    engine: whose kernels must run every entry; "any": only the format must hold it

    Raises:
        InputError: a part for which nothing is left.
    """
    possible: dict[Part, tuple[Entry, ...]] = {}
    refused: dict[str, str] = {}
    for part, linears in parts.items():
        reasons = {entry: _refused(linears, entry, fmt, engine, heads) for entry in menu}
        possible[part] = tuple(entry for entry, reason in reasons.items() if reason is None)
        if not possible[part]:
            raise InputError(f"--menu: nothing of it can be for {linears[0].name}: {reasons[menu[-1]]}")
        for entry, reason in reasons.items():
            if reason is not None:
                refused.setdefault(entry_name(entry), reason)
    return possible, [f"{name} left out: {reason}" for name, reason in refused.items()]


def _refused(linears: Sequence[LinearPlan], entry: Entry, fmt: Format, engine: str, heads: Heads) -> str | None:
    if entry is None:
        return None
    for linear in linears:
        reason = fmt.why_not(entry, linear.out_features, linear.in_features)
        if reason is not None:
            return f"{linear.name}: {reason}"
    if engine == "any":
        return None
    reason = why_not(engine, fmt.name, [replace(linear, scheme=entry) for linear in linears], heads)
    return reason and reason.partition("; ")[0]
