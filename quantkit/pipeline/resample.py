# SPDX-License-Identifier: Apache-2.0
"""More calibration text than there is: what the original model itself would have written in many places.

Tuning by gradients learns the few calibration windows by heart. The original model says what is right for any text,
so each copy of the windows has a share of its tokens replaced by what the model, having read those before, would put
there. A copy is made of the one before it, and so the text becomes the model's own; each takes one pass over the model.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.model.streaming import logits, outside_loaded, read_outside
from quantkit.pipeline.activations import Stream, few_positions
from quantkit.pipeline.forward import embed_original, ending_names, open_states
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.walk import walk

SHARE = 0.4  # of the tokens of a copy are replaced


@torch.no_grad()
def resample(runtime: Runtime, tokens: TokenSet, copies: int, progress: Progress) -> Tensor:
    """Token ids int64 [copies * samples, seqlen], copy after copy, the same on every run on the same device."""
    states = replace(open_states(runtime, tokens, "tuning"), exact=False)
    generator = torch.Generator(runtime.device).manual_seed(0)
    written = [tokens.input_ids]
    for copy in range(copies):
        stage = f"let the original model rewrite the calibration text, copy {copy + 1} of {copies}"
        last = replace(tokens, input_ids=written[-1])
        embed_original(runtime, last, states)
        with walk(runtime) as layers:
            for layer in layers:
                progress.ending(f"{stage}: layer {layer.index + 1}")
                layer.advance(states)
        written.append(_rewritten(runtime, last, states, generator))
    return torch.cat(written[1:])


def _rewritten(runtime: Runtime, tokens: TokenSet, states: Stream, generator: torch.Generator) -> Tensor:
    """The ids with a share of them replaced by the model, of which `states` has left the last layer."""
    model, device = runtime.model, runtime.device
    written = []
    with outside_loaded(model, runtime.loaded(read_outside(model, ending_names(model)))):
        for batch in states.batches():
            ids = tokens.input_ids[batch].to(device)
            before = states.states[batch, :-1]  # the last position predicts what comes after the window
            next_ids = torch.empty_like(ids[:, 1:])
            for some in few_positions(before, model.config.vocab_size):
                chances = logits(model, before[:, some].to(device)).float().softmax(-1).flatten(0, 1)
                next_ids[:, some] = torch.multinomial(chances, 1, generator=generator).view(len(ids), -1)
            replaced = torch.rand(next_ids.shape, generator=generator, device=device) < SHARE
            written.append(torch.cat([ids[:, :1], torch.where(replaced, next_ids, ids[:, 1:])], 1).cpu())
    return torch.cat(written)
