# SPDX-License-Identifier: Apache-2.0
"""What to try next where the verdict is FAIL, or a PASS that came close to a limit, as a whole command."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.methods.table import METHODS
from quantkit.records import Foreign, Result, Verification
from quantkit.settings.defaults import DEFAULT_SAMPLES
from quantkit.units import format_bytes
from quantkit.verdict import close_to_limits, objections

FINEST_GROUP = 32
MORE_BITS = {2: 3, 3: 4, 4: 8}  # what all formats for GPUs hold


def next_step(result: Result | Foreign, out: str) -> list[str]:
    """Lines that say how close it was, and what to type next; none where the verdict is a good PASS.

    out: the folder of the checkpoint
    """
    measured = result.verification
    if measured is None:
        return []
    close = close_to_limits(measured, measured.limits) if measured.verdict == "pass" else []
    if measured.verdict == "pass" and not close:
        return []
    if measured.differences:  # no run mends what a config or tokenizer says
        again = shlex.join(["quantkit", "verify", out, "--against", result.model])
        return [f"mend what differs, or name the model that it was made from; then: {again}"]
    return [*close, f"try next: {_command(result, measured, out)}"]


def usage(result: Result | Foreign, out: str) -> list[tuple[str, str]]:
    """What a folder that has not failed is good for: a few words, and the command to type.

    out: the folder of the checkpoint
    """
    measured = result.verification
    if measured is not None and measured.verdict == "fail":
        return []
    rows = [("talk to it", ["quantkit", "chat", out]), ("serve it", ["quantkit", "serve", out])]
    if measured is None:
        rows.append(("measure it", ["quantkit", "verify", out]))
    elif isinstance(result, Result):
        rows.append(("publish it", ["quantkit", "push", out, "ORG/NAME"]))
    return [(what, shlex.join(words)) for what, words in rows]


def best_of(rows: Sequence[Mapping[str, Any]], command: str) -> dict[str, str] | None:
    """Of the measured settings of a sweep that fit the budget, the one with the lowest KL, and the command of its run.

    command: the sweep's own
    """
    fitting = [row for row in rows if row["fits"] and row["kl_divergence"] is not None]
    if not fitting:
        return None
    best = min(fitting, key=lambda row: (row["kl_divergence"], row["total_bytes"]))
    words = _without(shlex.split(command), ["--method", "--w-bit", "--group", "--out"])
    others = [word for word in words[2:] if word not in ("--fresh", "--json")]
    numbers = ["--w-bit", str(best["bits"]), "--group", str(best["group_size"])]
    return {
        "name": best["name"],
        "kl": f"{best['kl_divergence']:.4g}",
        "size": format_bytes(best["total_bytes"]),
        "command": shlex.join(["quantkit", best["method"], *others, *numbers]),
    }


def _command(result: Result | Foreign, measured: Verification, out: str) -> str:
    if _only_too_large(measured):
        return shlex.join(["quantkit", "fit", result.model])
    if isinstance(result, Foreign):
        return shlex.join(["quantkit", "awq", result.model])
    words = _run_words(result)
    if measured.strange_linears or not measured.tokens:
        return shlex.join([*words, "--out", out, "--fresh"])
    if not METHODS[result.method].calibrates:
        better = next(row.name for row in METHODS.values() if row.calibrates)
        return shlex.join([words[0], better, *words[2:], "--out", f"{out}-{better}"])
    tag, change = _better(result)
    return shlex.join([*words[:2], *_without(words[2:], change[:1]), *change, "--out", f"{out}-{tag}"])


def _only_too_large(measured: Verification) -> bool:
    fits = measured.fit is None or measured.fit.fits
    return not fits and not objections(measured.content(), measured.limits)


def _run_words(result: Result) -> list[str]:
    """The command of the run without where it wrote; where it is not known, one that asks for the same."""
    words = shlex.split(result.command)
    if words[:2] == ["quantkit", result.method]:
        return _without([word for word in words if word != "--fresh"], ["--out"])
    scheme = result.scheme
    numbers = [] if scheme.group_size is None else ["--w-bit", str(scheme.bits), "--group", str(scheme.group_size)]
    return ["quantkit", result.method, result.model, *numbers]


def _without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words but for these options and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        name, sign, _ = word.partition("=")
        if not skip and name not in options:
            kept.append(word)
        skip = not skip and name in options and not sign
    return kept


def _better(result: Result) -> tuple[str, list[str]]:
    """What loses less, the cheapest first: a name for it, and its options."""
    scheme, calibration = result.scheme, result.calibration
    if calibration is not None and calibration.samples < DEFAULT_SAMPLES:
        return f"{DEFAULT_SAMPLES}-samples", ["--samples", str(DEFAULT_SAMPLES)]
    if not result.options.get("tune"):
        return "best", ["--quality", "best"]
    if scheme.grid != "integer":
        return "q6_k", ["--scheme", "q6_k"]
    if scheme.group_size is None or not 0 < scheme.group_size <= FINEST_GROUP:
        return f"g{FINEST_GROUP}", ["--group", str(FINEST_GROUP)]
    bits = MORE_BITS[min(scheme.bits, 4)]
    return f"w{bits}", ["--w-bit", str(bits)]
