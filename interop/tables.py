# SPDX-License-Identifier: Apache-2.0
"""RESULTS.md and the table in docs/engines.md, from results.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interop.environments import ROOT
from interop.pairs import (
    AGREE,
    CASES,
    EXACT,
    HALF,
    KNOWN,
    READERS,
    SAMPLES,
    SEQLEN,
    WRITERS,
    Case,
    outcome,
    reason,
    runs_here,
)

TABLE = Path(__file__).parent / "RESULTS.md"
PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- interop: made by `make interop` -->", "<!-- /interop -->"
Results = Mapping[str, Mapping[str, Any]]


def unexpected(results: Results) -> list[str]:
    """What is not as known: one line each. A pair that was not run is not judged."""
    lines = []
    for pair, result in results.items():
        found, known = outcome(pair, result), reason(pair)
        if found in ("wrong", "says") and known is None and not result.get("not_runnable"):
            lines.append(f"{pair}: {found} {result.get('said', result.get('error', ''))}, and nothing is known of it")
        if found.startswith("ok") and known is not None:
            lines.append(f"{pair}: {found}, but known as: {known}")
    return lines


def write_tables(results: Results) -> None:
    """Write both from the results."""
    TABLE.write_text(render(results), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN in page and END in page:
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{summary(results)}{END}{rest.partition(END)[2]}", encoding="utf-8")


# ---------------------------------------------------------------- RESULTS.md


def render(results: Results) -> str:
    """RESULTS.md: every pair with its figure."""
    lines = [
        "# What real clients make of it",
        "",
        "Made by `make interop`. Logits of each client against quantkit's own float32 forward on the weights it reads"
        f" from the same files: max |difference| / max |logit| over {SAMPLES} x {SEQLEN} tokens. `demo` ties its"
        " embeddings, `mini` does not; both have biases on q, k and v. AutoGPTQ needs a head beside a tied one, so"
        " it is asked about `mini` alone. SGLang and TensorRT-LLM run on GPUs only and are not here.",
        "",
        f"ok: at most {EXACT:g}, or (fp16) at most {HALF:g}, which is what a kernel that computes in float16 is apart.",
        "For AWQ the columns of GPTQModel, transformers and AutoAWQ are one witness, not three: transformers calls",
        "GPTQModel, whose unpacking is AutoAWQ's code; in float16 the two give the same bits.",
        "",
        "## Checkpoints that quantkit writes",
        "",
        f"| checkpoint | {' | '.join(reader.name for reader in READERS)} |",
        f"| --- | {' | '.join('---' for _ in READERS)} |",
    ]
    for case in CASES:
        cells = [_cell(results, case, i) for i in range(len(READERS))]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Checkpoints that others write, measured by `quantkit verify`",
        "",
        f"Beside it the figures of the tool's own forward. They must agree to {AGREE:g} relative. The last column: to"
        " which formats `quantkit convert` brings every integer as it is.",
        "",
        "| checkpoint | perplexity: verify | its own | apart | KL: verify | its own | apart |  | converts to |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for foreign in WRITERS:
        pair = f"{foreign.name} > verify"
        lines.append(f"| {foreign.name} | {_figures(pair, results.get(pair))} |")
    lines += ["", "## Why some are not ok", ""]
    lines += [f"- {known.client}, `{known.checkpoint}`: {known.reason}." for known in KNOWN]
    lines += [
        "",
        "An error of 0 is real: with one bit of one code flipped in a copy, GPTQModel is 1.3e-03 from the original, and"
        " 0 from the copy.",
        "",
        f"Versions: {_versions(results)}",
        "",
    ]
    return "\n".join(lines)


def _cell(results: Results, case: Case, reader: int) -> str:
    client = READERS[reader]
    if not client.reads(case):
        return "–"
    pair = f"{case.name} < {client.name}"
    result = results.get(pair)
    found = outcome(pair, result)
    if result is None:
        return found
    if "said" in result:
        told = f"{'says' if runs_here(pair, result) else 'not runnable here'}: {result['said']}"
        return told.replace("|", "\\|")
    known = " (known)" if found == "wrong" and reason(pair) else ""
    return f"{'WRONG' if found == 'wrong' else found}{known} {result['error']:.0e}"


def _figures(pair: str, result: Mapping[str, Any] | None) -> str:
    found = outcome(pair, result)
    if result is None or "said" in result:
        told = "not run" if result is None else f"not runnable here: {result['said']}"
        if result is not None and not result.get("not_runnable"):
            told = f"says: {result['said']}"
        return " | ".join([*[""] * 6, told, ""])
    cells = []
    for name in ("perplexity", "kl_divergence"):
        cells += [f"{result['quantkit'][name]:.6g}", f"{result['theirs'][name]:.6g}", f"{result['apart'][name]:.0e}"]
    kept = [target for target, why_not in result.get("converts", {}).items() if why_not is None]
    return " | ".join([*cells, "WRONG" if found == "wrong" else found, ", ".join(kept)])


def _versions(results: Results) -> str:
    versions: dict[str, set[str]] = {}
    for result in results.values():
        for name, found in result.get("versions", {}).items():
            if found != "none":
                versions.setdefault(name, set()).add(found)
    return ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in sorted(versions.items()))


# ---------------------------------------------------------------- docs/engines.md


def summary(results: Results) -> str:
    """Client x format x bits x group: ok where every such checkpoint is; a number names the reason below."""
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        rows.setdefault((case.format, case.scheme), []).append(case)
    reasons: list[str] = []
    lines = [
        f"| format | scheme | {' | '.join(reader.name for reader in READERS)} |",
        f"| --- | --- | {' | '.join('---' for _ in READERS)} |",
    ]
    for (fmt, scheme), cases in rows.items():
        cells = [_short(results, cases, i, reasons) for i in range(len(READERS))]
        lines.append(f"| {fmt} | {scheme} | {' | '.join(cells)} |")
    notes = [f"{number}. {text}" for number, text in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes, "", f"Versions: {_versions(results)}.", ""])


def _short(results: Results, cases: Sequence[Case], reader: int, reasons: list[str]) -> str:
    client = READERS[reader]
    cases = [case for case in cases if client.reads(case)]
    if not cases:
        return "–"
    found, notes, here = [], [], False
    for case in cases:
        pair = f"{case.name} < {client.name}"
        result = results.get(pair)
        said = outcome(pair, result)
        found.append(said)
        if result is not None and said in ("wrong", "says"):
            runs = runs_here(pair, result)
            here = here or runs
            why = reason(pair) or str(result.get("said", "wrong"))
            text = why if runs else f"not runnable here: {why}"
            if text not in reasons:
                reasons.append(text)
            notes.append(reasons.index(text) + 1)
    numbers = f" [{', '.join(map(str, sorted(set(notes))))}]" if notes else ""
    judged = [said for said in found if said != "not run"]
    if not judged:
        return "not run"
    good = sum(said.startswith("ok") for said in judged)
    bad = "no" if here else "not here"
    return ("ok" if good == len(judged) else f"{good} of {len(judged)}" if good else bad) + numbers
