# SPDX-License-Identifier: Apache-2.0
"""What `quantkit fit` prints: the answer, memory, the engine's flags, what quantizing needs, engines."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantkit.records import EngineBatch, EngineUse, Fit
from quantkit.serving.stored import KINDS
from quantkit.units import format_bytes

WORKSPACE = {
    "activations": "a batch of {tokens:,} tokens",
    "compilation": "more than that while the model is compiled",
    "logits": "{sequences:,} sequences, more than that while they are sampled",
    "graphs": "CUDA graphs",
    "engine": "context and libraries",
    "loading": "what tensors grow by when they are loaded",
    "margin": "starts differ",
    "block": "one block of the KV cache",
    "communication": "between the cards",
}


def table(fit: Fit, alternatives: Sequence[str] = ()) -> Group:
    """What `fit` said for a terminal; alternatives: commands of what would fit."""
    problems = fit.tensor_parallel.problems
    parts: list[Any] = [_verdict(fit)]
    # A command that is cut into lines cannot be copied.
    parts += [Text(f"  would fit: {line}", "yellow", no_wrap=True, overflow="ignore") for line in alternatives]
    parts.append(_memory(fit))
    parts += [
        Text(f"cannot be cut over {fit.tensor_parallel.cards} cards: {problem}", style="red") for problem in problems
    ]
    if fit.engine is not None:
        parts += _engine(fit.engine)
    if fit.ram_bytes is not None:
        parts.append(_needs(fit))
    loads = Table(title="loads in", **_STYLE)
    loads.add_column("engine")
    loads.add_column("")
    for engine, reason in fit.engines.items():
        loads.add_row(engine, Text(reason) if reason else Text("yes", style="green"))
    return Group(*parts, loads)


_STYLE: dict[str, Any] = {"box": None, "title_justify": "left", "show_header": False, "padding": (0, 2, 0, 0)}


def _memory(fit: Fit) -> Table:
    card = fit.tensor_parallel
    memory = Table(title="memory" + (f" on each of {card.cards} cards" if card.cards > 1 else ""), **_STYLE)
    memory.add_column("what")
    memory.add_column("size", justify="right")
    memory.add_column("bytes", justify="right", style="dim")
    memory.add_column("")

    def row(what: str, size: int, note: str = "", style: str = "") -> None:
        memory.add_row(what, format_bytes(size), f"{size:,}", note, style=style)

    for kind, label in KINDS.items():
        if fit.weights[kind]:
            row(f"  {label}", fit.weights[kind])
    ratio = fit.weights["total"] / fit.weights_16bit
    row("weights", fit.weights["total"], f"{ratio:.1%} of 16 bit ({format_bytes(fit.weights_16bit)})", "bold")
    if card.cards > 1:
        row("weights on a card", card.weights_bytes, style="bold")
    per_token = f"{fit.context:,} tokens of {fit.kv}, {card.kv_bytes_per_token:,} bytes each"
    row("KV cache", card.kv_bytes, per_token, "bold")
    for part, note in WORKSPACE.items():
        if fit.workspace.get(part):
            row(
                f"  {part}",
                fit.workspace[part],
                note.format(tokens=fit.model["prefill_tokens"], sequences=fit.model["sequences"]),
            )
    row("workspace", card.workspace_bytes, f"of {fit.engine.name}" if fit.engine else "", style="bold")
    memory.add_section()
    row("total", fit.total_bytes, style="bold")
    spare = fit.margin_bytes
    row("budget", fit.budget_bytes, f"{format_bytes(abs(spare))} {'left' if spare >= 0 else 'too much'}")
    return memory


def _verdict(fit: Fit) -> Text:
    longest, allowed, cut = fit.longest_context, fit.max_position_embeddings, fit.tensor_parallel.problems
    head = "DOES NOT FIT" if not fit.fits else "FITS, BUT CANNOT BE CUT" if cut else "FITS"
    text = Text(head, style="bold green" if fit.fits and not cut else "bold red")
    limit = "all that the model allows" if longest == allowed else f"the model allows {allowed:,}" if allowed else ""
    spare = f"{format_bytes(abs(fit.margin_bytes))} {'left' if fit.margin_bytes >= 0 else 'too much'}"
    where = f" {format_bytes(fit.budget_bytes)} with {fit.context:,} tokens of context, {spare}"
    text.append(f"{' in' if fit.fits else ':'}{where}", style="default")
    text.append(f"; longest context that fits: {longest:,} tokens" if longest else "; no context fits", style="default")
    return text.append(f" ({limit})" if limit else "", style="default")


def _engine(engine: EngineUse) -> list[Any]:
    """The flags and what they cost; the other batches that were to choose from."""
    parts: list[Any] = []
    said = "" if engine.measured else ", not measured"
    flags = Table(title=f"flags of {engine.name} {engine.version}{said}", **_STYLE)
    flags.add_column("flag", no_wrap=True)
    flags.add_column("")
    for flag in engine.costs:
        flags.add_row(" ".join(flag.words), flag.note)
    if engine.costs:
        parts.append(flags)
    if len(engine.batches) > 1:
        others = Table(title="longest context by flags", **_STYLE)
        others.add_column("flags", no_wrap=True)
        others.add_column("tokens", justify="right")
        others.add_column("")
        for batch in engine.batches:
            note = "" if batch.measured else "not measured"
            others.add_row(_batch(batch), f"{batch.context:,}", note)
        parts.append(others)
    return parts


def _batch(batch: EngineBatch) -> str:
    eager = ", eager" if batch.eager else ""
    return f"{batch.batched_tokens:,} batched tokens, {batch.sequences} sequences{eager}"


def _needs(fit: Fit) -> Table:
    needs = Table(title="to quantize", **_STYLE)
    needs.add_column("what")
    needs.add_column("size", justify="right")
    needs.add_column("")
    hidden = format_bytes(fit.hidden_states_bytes or 0)
    needs.add_row("RAM", format_bytes(fit.ram_bytes or 0), "on a CPU, at most")
    needs.add_row("GPU memory", format_bytes(fit.device_bytes or 0), "with --device cuda, at most")
    needs.add_row("disk", format_bytes(fit.disk_bytes or 0), f"and {hidden} of hidden states a stream, if not in RAM")
    return needs
