# SPDX-License-Identifier: Apache-2.0
"""A token stream on its way through one layer: run to a site, the layer starts where what is known ends.

A site's inputs come from the sites before it as they are by now, so a layer is run once for each site. What the linears
of earlier sites read has not changed since, unless a scale was folded into what makes it: it is kept, where memory
allows, and the parts before it are left out (`model.shortcuts`). Once such a linear has its last weights, what it
returns is kept in the same place instead.

What is run here is summed up over many tokens, so a CPU may multiply in bfloat16, as a GPU does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.model.families import Site
from quantkit.model.shortcuts import Known, Shortcut, find_shortcuts, taken, watched
from quantkit.model.streaming import StreamedModel, run_to
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import run_finite


@dataclass
class Passage:
    """A stream before, and in, layer `index` (materialised).

    samples: of it that are run to the sites; shortcuts: of which something is kept; weights: what the layer runs with
    (names local to it), None: its own; known: what is kept; leaves: whether the samples are to leave the layer when
    they are run to its last site; left: how many have
    """

    model: StreamedModel
    index: int
    stream: Stream
    samples: int
    shortcuts: tuple[Shortcut, ...] = ()
    weights: Mapping[str, Tensor] | None = None
    known: dict[Shortcut, Known] = field(default_factory=dict)
    leaves: bool = False
    left: int = 0

    @property
    def ends_whole(self) -> bool:
        """Whether the samples end where a micro-batch does: others are then cut as if all ran in one go."""
        return self.samples == len(self.stream.states) or self.samples % self.stream.batch == 0


def shortcuts_of(
    model: StreamedModel, index: int, stream: Stream, sites: Sequence[Site], widest: int
) -> tuple[Shortcut, ...]:
    """The shortcuts of a materialised layer by linears that are a site alone and read at most so many features."""
    layer = model.layers[index]
    weights = {
        site.linears[0]: layer.get_parameter(f"{site.linears[0]}.weight") for site in sites if len(site.linears) == 1
    }
    narrow = [name for name, weight in weights.items() if weight.shape[1] <= widest]
    if not narrow:
        return ()
    hidden = stream.states[next(stream.batches())].to(weights[narrow[0]].device)
    return find_shortcuts(model, index, hidden, narrow)


def inputs_of(
    passage: Passage, linear: str, device: torch.device, *, last: bool = False, returned: bool = False
) -> Iterator[Tensor]:
    """What a linear reads, one micro-batch [samples, seqlen, in_features] at a time; keeps what is to be kept.

    last: this is the last site; returned: give what the linear returns instead, for which the layer runs to its end
    """
    model, index, stream = passage.model, passage.index, passage.stream
    layer, leaving = model.layers[index], last and passage.leaves and passage.ends_whole
    again = not last or passage.weights is None  # the layer runs once more on its new weights
    wanted = [shortcut for shortcut in passage.shortcuts if again and shortcut not in passage.known]
    # Where a linear's inputs are known its site is done, so it has its last weights: where its inputs were is room for
    # what it returns.
    final = [
        shortcut
        for shortcut, found in passage.known.items()
        if again and not found.returned and shortcut.linear != linear
    ]
    kept: dict[Shortcut, Known] = {}
    read = [linear, *(shortcut.linear for shortcut in wanted)]
    made = [*(shortcut.linear for shortcut in final), *([linear] if returned else [])]
    for batch in stream.batches(passage.samples):
        hidden = stream.states[batch].to(device)
        known = {shortcut: found.of(batch) for shortcut, found in passage.known.items()}
        with taken(layer, known), watched(layer, read, made) as (seen, outputs):
            if leaving or returned:
                left = run_finite(model, index, hidden, passage.weights, exact=False)
                if leaving:
                    stream.states[batch] = left
                del left  # before the next one is made
            else:
                run_to(model, index, hidden, linear, passage.weights, exact=False)
        for shortcut in wanted:
            if shortcut.linear in seen:
                tensor = seen[shortcut.linear]
                if shortcut not in kept:
                    kept[shortcut] = Known(tensor.new_empty(passage.samples, *tensor.shape[1:]))
                kept[shortcut].tensor[batch] = tensor
        for shortcut in final:
            room, output = passage.known[shortcut].tensor, outputs.pop(shortcut.linear, None)
            if output is not None and output.shape[-1] <= room.shape[-1]:
                kept[shortcut] = Known(room[..., : output.shape[-1]], returned=True)
                kept[shortcut].tensor[batch] = output
            del output
        yield outputs[linear] if returned else seen[linear]
    passage.known |= kept
    if leaving:
        passage.left, passage.known = passage.samples, {}


def forget(passage: Passage, sites: Sequence[Site], site: Site) -> None:
    """A scale was folded into the site's producer: what came after that is not as it was kept."""
    changed = next((n + 1 for n, before in enumerate(sites) if site.producer in before.linears), sites.index(site))
    read = {name for after in sites[changed:] for name in after.linears}
    passage.known = {
        shortcut: kept
        for shortcut, kept in passage.known.items()
        if shortcut.linear not in read and not (kept.returned and shortcut.linear == site.producer)
    }
