# SPDX-License-Identifier: Apache-2.0
"""The words that start an engine's server with what `fit` counted: flags, and what each of them costs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from quantkit.hardware.card import Card
from quantkit.serving.engine_memory import Batch
from quantkit.units import format_bytes

USUAL_SHARE = 0.93  # of a card: 22 GiB of an RTX 4090, which has 23.65 GiB
START: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "serve"),
    "sglang": ("python", "-m", "sglang.launch_server", "--model-path"),
    "llama.cpp": ("llama-server", "--model"),
}


class Flag(NamedTuple):
    """A flag's words, and what it costs or saves."""

    words: tuple[str, ...]
    note: str


class Served(NamedTuple):
    """What a server is started for: tokens of context, bytes of each card for weights, cache and workspace."""

    context: int
    budget: int
    kv: str
    cards: int
    card: Card | None
    workspace: Mapping[str, int]
    cache_bytes: int


def share(budget: int, card: Card | None) -> float:
    """The budget as a part of the card's memory, rounded down to a millionth."""
    return USUAL_SHARE if card is None else min(1.0, budget * 10**6 // card.memory_bytes / 10**6)


def flags_of(engine: str, batch: Batch, served: Served) -> list[Flag]:
    """The flags of an engine's server; none where no context fits, or the engine has no server."""
    makers = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llamacpp}
    return makers[engine](batch, served) if engine in makers and served.context > 0 else []


def words(flags: Sequence[Flag]) -> list[str]:
    """The flags as a command line has them."""
    return [word for flag in flags for word in flag.words]


def _vllm(batch: Batch, served: Served) -> list[Flag]:
    work = served.workspace
    prefill = format_bytes(work["activations"] + work["compilation"])
    graphs = f", graphs {format_bytes(work['graphs'])}" if work["graphs"] else ""
    flags = [
        Flag(("--max-model-len", f"{served.context}"), f"KV cache {format_bytes(served.cache_bytes)}"),
        Flag(("--max-num-batched-tokens", f"{batch.tokens}"), f"one batch {prefill}"),
        Flag(("--max-num-seqs", f"{batch.sequences}"), "sequences at once" + graphs),
        Flag(("--gpu-memory-utilization", f"{share(served.budget, served.card):g}"), _share_note(served)),
    ]
    if batch.eager:
        flags.append(Flag(("--enforce-eager",), "no compilation and no graphs: more context, slower tokens"))
    if served.kv == "fp8":
        flags.append(Flag(("--kv-cache-dtype", "fp8"), "half the KV cache; its loss is not measured here"))
    if served.cards > 1:
        flags.append(Flag(("--tensor-parallel-size", f"{served.cards}"), "cards that each linear is cut over"))
    return flags


def _sglang(batch: Batch, served: Served) -> list[Flag]:
    # Its share is of weights and cache alone: the workspace comes on top.
    static = share(served.budget - served.workspace["total"], served.card)
    prefill = format_bytes(served.workspace["activations"])
    flags = [
        Flag(("--context-length", f"{served.context}"), f"KV cache {format_bytes(served.cache_bytes)}"),
        Flag(("--max-total-tokens", f"{served.context}"), "of all sequences together"),
        Flag(("--chunked-prefill-size", f"{batch.tokens}"), f"one batch {prefill}"),
        Flag(("--max-running-requests", f"{batch.sequences}"), "sequences at once"),
        Flag(("--mem-fraction-static", f"{static:g}"), "weights and KV cache"),
    ]
    if served.kv == "fp8":
        flags.append(Flag(("--kv-cache-dtype", "fp8_e5m2"), "half the KV cache; its loss is not measured here"))
    if served.cards > 1:
        flags.append(Flag(("--tensor-parallel-size", f"{served.cards}"), "cards that each linear is cut over"))
    return flags


def _llamacpp(batch: Batch, served: Served) -> list[Flag]:
    return [
        Flag(("--ctx-size", f"{served.context}"), f"KV cache {format_bytes(served.cache_bytes)}"),
        Flag(("--n-gpu-layers", "999"), "all layers on the GPU"),
        Flag(("--ubatch-size", f"{batch.tokens}"), f"logits {format_bytes(served.workspace['logits'])}"),
        Flag(("--parallel", f"{batch.sequences}"), "sequences that share the context"),
    ]


def _share_note(served: Served) -> str:
    if served.card is None:
        whole = format_bytes(int(served.budget / USUAL_SHARE))
        return f"{format_bytes(served.budget)} of a card of {whole}, such as an RTX 4090; none is seen here"
    return f"{format_bytes(served.budget)} of {served.card.name}"
