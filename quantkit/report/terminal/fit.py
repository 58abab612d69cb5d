# SPDX-License-Identifier: Apache-2.0
"""What `quantkit fit` prints: memory, what quantizing needs, and which engines load it."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantkit.serving.fit import KINDS
from quantkit.units import format_bytes


def table(result: Mapping[str, Any]) -> Group:
    """The document of `fit` for a terminal: memory, what quantizing needs, and which engines load it."""
    card = result["tensor_parallel"]
    cards = card["cards"]
    memory = Table(title="memory" + (f" on each of {cards} cards" if cards > 1 else ""), **_STYLE)
    memory.add_column("what")
    memory.add_column("size", justify="right")
    memory.add_column("bytes", justify="right", style="dim")
    memory.add_column("")

    def row(what: str, size: int, note: str = "", style: str = "") -> None:
        memory.add_row(what, format_bytes(size), f"{size:,}", note, style=style)

    for kind, label in KINDS.items():
        if result["weights"][kind]:
            row(f"  {label}", result["weights"][kind])
    ratio = result["weights"]["total"] / result["weights_16bit"]
    row(
        "weights",
        result["weights"]["total"],
        f"{ratio:.1%} of 16 bit ({format_bytes(result['weights_16bit'])})",
        "bold",
    )
    if cards > 1:
        row("weights on a card", card["weights_bytes"], style="bold")
    per_token = f"{result['context']:,} tokens of {result['kv']}, {card['kv_bytes_per_token']:,} bytes each"
    row("KV cache", card["kv_bytes"], per_token, "bold")
    for part, note in (
        ("activations", f"prefill of {result['model']['prefill_tokens']:,} tokens at once"),
        ("logits", "one sequence"),
        ("engine", "context, libraries, graphs"),
        ("communication", "between the cards"),
    ):
        if result["workspace"][part]:
            row(f"  {part}", result["workspace"][part], note)
    row("workspace", card["workspace_bytes"], style="bold")
    memory.add_section()
    row("total", result["total_bytes"], style="bold")
    left = result["margin_bytes"]
    row("budget", result["budget_bytes"], f"{format_bytes(abs(left))} {'left' if left >= 0 else 'too much'}")
    parts: list[Any] = [memory, _verdict(result)]
    parts += [Text(f"cannot be cut over {cards} cards: {problem}", style="red") for problem in card["problems"]]
    if "ram_bytes" in result:
        parts.append(_needs(result))
    loads = Table(title="loads in", **_STYLE)
    loads.add_column("engine")
    loads.add_column("")
    for engine, reason in result["engines"].items():
        loads.add_row(engine, Text(reason) if reason else Text("yes", style="green"))
    return Group(*parts, loads)


_STYLE: dict[str, Any] = {"box": None, "title_justify": "left", "show_header": False, "padding": (0, 2, 0, 0)}


def _verdict(result: Mapping[str, Any]) -> Text:
    fits, longest, allowed = result["fits"], result["longest_context"], result["max_position_embeddings"]
    cut = result["tensor_parallel"]["problems"]
    head = "DOES NOT FIT" if not fits else "FITS, BUT CANNOT BE CUT" if cut else "FITS"
    text = Text(head, style="bold green" if fits and not cut else "bold red")
    limit = "all that the model allows" if longest == allowed else f"the model allows {allowed:,}" if allowed else ""
    text.append(f"; longest context that fits: {longest:,} tokens" if longest else "; no context fits", style="default")
    return text.append(f" ({limit})" if limit else "", style="default")


def _needs(result: Mapping[str, Any]) -> Table:
    needs = Table(title="to quantize", **_STYLE)
    needs.add_column("what")
    needs.add_column("size", justify="right")
    needs.add_column("")
    hidden = format_bytes(result["hidden_states_bytes"])
    needs.add_row("RAM", format_bytes(result["ram_bytes"]), "on a CPU, at most")
    needs.add_row("GPU memory", format_bytes(result["device_bytes"]), "with --device cuda, at most")
    needs.add_row("disk", format_bytes(result["disk_bytes"]), f"and {hidden} of hidden states a stream, if not in RAM")
    return needs
