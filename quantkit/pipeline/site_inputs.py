# SPDX-License-Identifier: Apache-2.0
"""What the sites of a layer read, as a token stream runs through it.

A site's inputs come from the sites before it as they are by now, so a layer is run once for each site. What the linears
of earlier sites read has not changed since, unless a scale was folded into what makes it: it is kept, where memory
allows, and the parts before it are left out (`model.shortcuts`). Once such a linear has its last weights, what it
returns is kept in the same place instead. `observe` sums up what all sites of the original read, in one run.

What calibrates is summed up over many tokens, so a CPU may multiply in bfloat16, as a GPU does (`Stream.exact`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from quantkit.formats.names import expert_of
from quantkit.hardware.batching import samples_per_sum
from quantkit.model.family import Site
from quantkit.model.shortcuts import Known, Shortcut, find_shortcuts, taken, watched
from quantkit.model.streaming import run_to
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import Layer
from quantkit.stats import SiteStats, Sums, empty_stats, require_finite_stats, shrink_


@dataclass
class Passage:
    """A stream on its way through a materialised layer.

    samples: how many of it are run to the sites
    shortcuts: the linears whose inputs or outputs may be kept
    weights: what the layer runs with (names local to it); None: its own
    known: what is kept so far
    run_to_end: run the samples through the whole layer, not only up to the last site
    finished: number of samples already past the layer
    """

    layer: Layer
    stream: Stream
    samples: int
    shortcuts: tuple[Shortcut, ...] = ()
    weights: Mapping[str, Tensor] | None = None
    known: dict[Shortcut, Known] = field(default_factory=dict)
    run_to_end: bool = False
    finished: int = 0

    @property
    def ends_whole(self) -> bool:
        """Whether the samples end where a micro-batch does: others are then cut as if all ran in one go."""
        return self.samples == len(self.stream.states) or self.samples % self.stream.batch == 0


def shortcuts_of(layer: Layer, stream: Stream, widest: int) -> tuple[Shortcut, ...]:
    """The shortcuts of a layer by linears that are a site alone and read at most so many features."""
    alone = [site.linears[0] for site in layer.sites if len(site.linears) == 1 and not expert_of(site.linears[0])]
    narrow = [name for name in alone if layer.module.get_parameter(f"{name}.weight").shape[1] <= widest]
    if not narrow:
        return ()
    hidden = stream.states[next(stream.batches())].to(layer.runtime.device)
    return find_shortcuts(layer.runtime.model, layer.index, hidden, narrow)


def inputs_of(passage: Passage, linear: str, *, last: bool = False, returned: bool = False) -> Iterator[Tensor]:
    """What a linear reads, one micro-batch [samples, seqlen, in_features] at a time; fills `passage.known` on the way.

    last: this is the last site; returned: give what the linear returns instead, for which the layer runs to its end
    """
    layer, stream = passage.layer, passage.stream
    model, index, device, module = layer.runtime.model, layer.index, layer.runtime.device, layer.module
    to_end = last and passage.run_to_end and passage.ends_whole
    again = not last or passage.weights is None  # the layer runs once more on its new weights
    wanted = [shortcut for shortcut in passage.shortcuts if again and shortcut not in passage.known]
    # Where a linear's inputs are known its site is done, so it has its last weights: where its inputs were is room for
    # what it returns.
    final = [
        shortcut
        for shortcut, tensors in passage.known.items()
        if again and not tensors.returned and shortcut.linear != linear
    ]
    learned: dict[Shortcut, Known] = {}
    read = [linear, *(shortcut.linear for shortcut in wanted)]
    made = [*(shortcut.linear for shortcut in final), *([linear] if returned else [])]
    for batch in stream.batches(passage.samples):
        hidden = stream.states[batch].to(device)
        known = {shortcut: tensors.of(batch) for shortcut, tensors in passage.known.items()}
        with taken(module, known), watched(module, read, made) as (inputs, outputs):
            if to_end or returned:
                end = layer.run(hidden, passage.weights, exact=stream.exact)
                if to_end:
                    stream.states[batch] = end
                del end  # before the next one is made
            else:
                run_to(model, index, hidden, linear, passage.weights, exact=stream.exact)
        for shortcut in wanted:
            if shortcut.linear in inputs:
                tensor = inputs[shortcut.linear]
                if shortcut not in learned:
                    learned[shortcut] = Known(tensor.new_empty(passage.samples, *tensor.shape[1:]))
                learned[shortcut].tensor[batch] = tensor
        for shortcut in final:
            room, output = passage.known[shortcut].tensor, outputs.pop(shortcut.linear, None)
            if output is not None and output.shape[-1] <= room.shape[-1]:
                learned[shortcut] = Known(room[..., : output.shape[-1]], returned=True)
                learned[shortcut].tensor[batch] = output
            del output
        yield by_sample(outputs[linear] if returned else inputs[linear], hidden.shape[1])
    passage.known |= learned
    if to_end:
        passage.finished, passage.known = passage.samples, {}


def by_sample(tensor: Tensor, seqlen: int) -> Tensor:
    """What a linear reads or returns with its samples apart: some are handed the tokens of all in one row."""
    return tensor.unflatten(0, (-1, seqlen)) if tensor.dim() == 2 else tensor


def forget(passage: Passage, site: Site) -> None:
    """A scale was folded into the site's producer: what came after that is not as it was kept."""
    sites = passage.layer.sites
    producer = site.fold.producer if site.fold else None
    changed = next((n + 1 for n, before in enumerate(sites) if producer in before.linears), sites.index(site))
    read = {name for after in sites[changed:] for name in after.linears}
    passage.known = {
        shortcut: tensors
        for shortcut, tensors in passage.known.items()
        if shortcut.linear not in read and not (tensors.returned and shortcut.linear == producer)
    }


def observe(layer: Layer, stream: Stream) -> tuple[SiteStats, ...]:
    """Advance a stream through the layer, and sum up what each site reads on the way: one run for all sites.

    Raises:
        NumericsError: an output or a site's inputs are not finite.
    """
    linears = [layer.module.get_submodule(site.linears[0]) for site in layer.sites]
    widths = [cast(Tensor, linear.weight).shape[1] for linear in linears]
    at_once = samples_per_sum(stream.states.shape[1])
    sums = [Sums(empty_stats(width, layer.runtime.device), at_once) for width in widths]

    def watch(total: Sums) -> Callable[..., None]:
        return lambda module, args: total.add(by_sample(args[0], stream.states.shape[1]))

    handles = [linear.register_forward_pre_hook(watch(total)) for linear, total in zip(linears, sums, strict=True)]
    try:
        layer.advance(stream)
    finally:
        for handle in handles:
            handle.remove()
    stats = tuple(total.finish() for total in sums)
    for site, each in zip(layer.sites, stats, strict=True):
        require_finite_stats(each, f"{layer.name}.{site.linears[0]}")
    return tuple(map(shrink_, stats))
