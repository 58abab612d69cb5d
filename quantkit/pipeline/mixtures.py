# SPDX-License-Identifier: Apache-2.0
"""What the experts of a layer read, as the quantized model's own router sends tokens to them.

The layer is run to its experts once for all of them. What enters there is kept, like the hidden states that travel
through the layers, and one expert after the other takes its tokens from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from quantkit.formats.names import expert_of
from quantkit.hardware.batching import TOKENS_PER_SUM
from quantkit.hardware.matmul import fast_linears
from quantkit.methods.starved import KEPT_BACK, Evidence, is_starved
from quantkit.model.experts import Expert, by_expert
from quantkit.model.family import Site
from quantkit.model.shortcuts import taken
from quantkit.model.streaming import run_to
from quantkit.pipeline.activations import Stream, open_stream
from quantkit.pipeline.site_inputs import Passage
from quantkit.stats import SiteStats, collect, shrink_

LAYER_TOKENS = 8  # of the layer for each input, that an expert with too few of its own is shown


@dataclass(frozen=True)
class Routed:
    """What a mixture reads.

    block: its name in the layer; stream: the tokens that enter it, on the quantized model; original: the first of them
    as they enter it in the original; tokens: the numbers of those that each expert is sent, in order
    """

    passage: Passage
    block: str
    stream: Stream
    original: Stream | None
    weights: Mapping[str, Tensor] | None
    tokens: list[Tensor]


def route(passage: Passage, original: Passage | None, block: str) -> Routed:
    """Run the layer to its experts, and keep what they read there."""
    stream, choices = _entering(passage, block)
    experts = passage.layer.module.get_submodule(block)
    numbers = torch.cat([choice.flatten(0, -2) for choice in choices])
    tokens = [token for token, _ in by_expert(numbers, len(cast(torch.nn.ModuleList, experts)))]
    theirs = None if original is None else _entering(original, block)[0]
    return Routed(passage, block, stream, theirs, None if original is None else original.weights, tokens)


def _entering(passage: Passage, block: str) -> tuple[Stream, list[Tensor]]:
    """What enters a mixture, and the numbers of the experts that are chosen there, by micro-batch."""
    layer, stream = passage.layer, passage.stream
    runtime = layer.runtime
    spill = runtime.folder / f".experts-{'original' if passage.weights else 'quantized'}-{runtime.ranks.rank}.tmp"
    seqlen, room = stream.states.shape[1], None
    choices = []
    for batch in stream.batches(passage.samples):
        known = {shortcut: tensors.of(batch) for shortcut, tensors in passage.known.items()}
        hidden = stream.states[batch].to(runtime.device)
        with taken(layer.module, known):
            entering, chosen, _ = run_to(runtime.model, layer.index, hidden, block, passage.weights, exact=stream.exact)
        if room is None:
            shape = passage.samples, seqlen, entering.shape[-1]
            room = open_stream(shape, stream.states.dtype, runtime.device, spill, stream.place, stream.batch)
        room.states[batch] = entering.view(-1, *room.states.shape[1:])
        choices.append(chosen)
    assert room is not None
    return room, choices


def expert_stats(routed: Routed, site: Site) -> tuple[SiteStats, Evidence | None]:
    """The sums of what a site of an expert reads, and what it leans on if that is too little."""
    name = site.linears[0]
    found = expert_of(name)
    assert found is not None
    tokens = routed.tokens[found[1]]
    width = routed.passage.layer.module.get_parameter(f"{name}.weight").shape[1]
    if not is_starved(len(tokens), width):
        return shrink_(_summed(routed, name, tokens, drift=True)), None
    count = routed.stream.states.shape[:2].numel()
    every = torch.arange(0, count, max(1, count // (LAYER_TOKENS * width)), device=tokens.device)
    own, layer = ([_summed(routed, name, part) for part in _parts(each)] for each in (tokens, every))
    return _summed(routed, name, tokens), Evidence(*own, *layer)


def _parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that are learnt from, and those that judge."""
    judging = torch.arange(len(tokens), device=tokens.device) % KEPT_BACK == KEPT_BACK - 1
    return tokens[~judging], tokens[judging]


def _summed(routed: Routed, linear: str, tokens: Tensor, *, drift: bool = False) -> SiteStats:
    layer = routed.passage.layer
    width = layer.module.get_parameter(f"{linear}.weight").shape[1]
    originals = None
    if drift and routed.original is not None:
        seen = tokens[tokens < routed.original.states.shape[:2].numel()]
        if len(seen):
            originals = _read(routed, linear, routed.original, seen, routed.weights)
    return collect(_read(routed, linear, routed.stream, tokens, None), width, layer.runtime.device, originals)


def _read(
    routed: Routed, linear: str, stream: Stream, tokens: Tensor, weights: Mapping[str, Tensor] | None
) -> Iterator[Tensor]:
    """What a linear of an expert reads of these tokens, so many at a time; weights: of the layer, if not its own."""
    layer = routed.passage.layer
    rows = stream.states.flatten(0, 1)
    owner, _, leaf = linear.rpartition(".")
    expert = layer.module.get_submodule(owner)
    assert isinstance(expert, Expert)
    own = {n: weights[f"{owner}.{n}"] for n in expert.state_dict()} if weights else {}
    for part in tokens.split(TOKENS_PER_SUM) if len(tokens) else ():
        hidden = rows[part.to(rows.device)].to(layer.runtime.device)
        if leaf == expert.names[2]:
            with fast_linears(hidden, exact=stream.exact):
                hidden = torch.func.functional_call(expert, own, (hidden,), {"whole": False})
        yield hidden
