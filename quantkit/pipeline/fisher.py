# SPDX-License-Identifier: Apache-2.0
"""What an error in a layer's output does to the model's predictions, to second order.

An error e [hidden] at one position of a layer's output changes what the model predicts by a KL divergence of about

    e^T F e / 2        F = E[g g^T], the Fisher information,

where g is the gradient of log p(y) with respect to that output, and y is drawn from the model's own p: what comes after
the layer hears some directions of the hidden states far better than others. (BRECQ, arXiv 2102.05426, weighs a block's
errors by the diagonal of F, which here wins nothing; K-FAC, arXiv 1503.05671, has it as a factor.)

F is a mean over positions, made in one pass of some of the calibration text through the original model and one back,
with one layer in memory; what enters each layer waits in files. Kept of it are the few directions that stand out.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.errors import NumericsError
from quantkit.hardware.batching import TOKENS_A_STEP
from quantkit.hardware.matmul import accumulate_, linear
from quantkit.model.streaming import logits, outside_loaded, read_outside, run_layer
from quantkit.pipeline.activations import Stream, few_positions
from quantkit.pipeline.forward import Layer, embed_original, ending_names, open_states
from quantkit.pipeline.runtime import Memory, Progress, Runtime
from quantkit.pipeline.walk import walk

TOKENS = 2**14  # that speak for all: a few times the hidden sizes that there are
DIRECTIONS = 256  # kept for each layer; what is left over counts in all directions alike
EVEN = 0.1  # share of the weight that is spread over all directions: F is an estimate


@torch.no_grad()
def output_directions(runtime: Runtime, tokens: TokenSet, progress: Progress) -> list[Tensor]:
    """For each layer the directions [hidden, k] of its output that matter, as `weighted_square` takes them, on the CPU.

    Raises:
        NumericsError: a gradient is not finite.
    """
    tokens = _some(tokens)
    device, layers = runtime.device, len(runtime.model.layers)
    batch = None if device.type == "cpu" else max(1, TOKENS_A_STEP // tokens.seqlen)
    runtime = replace(runtime, memory=Memory("file", batch))
    entering = [open_states(runtime, tokens, "tuning") for _ in range(layers + 1)]
    embed_original(runtime, tokens, entering[0])
    with walk(runtime) as forward:
        for layer in forward:
            index = layer.index
            progress.ending(f"see what matters to the original model: layer {index + 1}")
            for part in entering[index].batches():
                hidden = entering[index].states[part].to(device)
                entering[index + 1].states[part] = run_layer(runtime.model, index, hidden, exact=False)
    gradients = entering.pop()
    _start_back(runtime, gradients)
    directions = [_directions(_information(gradients, device), runtime.model.layer_name(layers - 1))]
    with walk(runtime, indices=range(layers - 1, 0, -1)) as back:
        for layer in back:
            progress.ending(f"see what matters to the original model: back through layer {layer.index + 1}")
            _step_back(layer, entering.pop(), gradients)
            name = runtime.model.layer_name(layer.index - 1)
            directions.append(_directions(_information(gradients, device), name))
    return directions[::-1]


def spilled_bytes(runtime: Runtime, tokens: TokenSet) -> int:
    """What `output_directions` takes of the disk while it works: what enters each layer, and what leaves the last."""
    model = runtime.model
    numbers = _some(tokens).input_ids.numel() * model.state_width
    return (len(model.layers) + 1) * numbers * runtime.dtype.itemsize


def _some(tokens: TokenSet) -> TokenSet:
    stride = max(1, tokens.input_ids.numel() // TOKENS)
    return replace(tokens, input_ids=tokens.input_ids[::stride])


def weighted_square(error: Tensor, directions: Tensor) -> Tensor:
    """The mean of e^T F e over all positions of error [..., hidden], F scaled to a mean eigenvalue of 1; a scalar.

    directions: V [hidden, k], which stands for F = V V^T + c I
    """
    even = 1 - directions.square().sum() / len(directions)
    return (linear(error, directions.T).square().sum(-1) + even * error.square().sum(-1)).mean()


def _start_back(runtime: Runtime, states: Stream) -> None:
    """Replace what leaves the last layer by the gradient there of log p(y), y drawn from p; in place."""
    model, device = runtime.model, runtime.device
    generator = torch.Generator(device).manual_seed(0)
    with outside_loaded(model, runtime.loaded(read_outside(model, ending_names(model)))):
        for part in states.batches():
            for some in few_positions(states.states[part], model.config.vocab_size):
                hidden = states.states[part, some].to(device).requires_grad_()
                with torch.enable_grad():
                    chances = logits(model, hidden).float().log_softmax(-1)
                drawn = torch.multinomial(chances.exp().flatten(0, 1), 1, generator=generator)
                with torch.enable_grad():
                    likelihood = chances.flatten(0, 1).gather(1, drawn).sum()
                states.states[part, some] = torch.autograd.grad(likelihood, hidden)[0]


def _step_back(layer: Layer, entering: Stream, gradients: Stream) -> None:
    """Turn the gradients at the output of the layer into those at its input, in place."""
    device = layer.runtime.device
    for part in gradients.batches():
        hidden = entering.states[part].to(device).requires_grad_()
        with torch.enable_grad():
            output = run_layer(layer.runtime.model, layer.index, hidden, exact=False)
        gradients.states[part] = torch.autograd.grad(output, hidden, gradients.states[part].to(device))[0]


def _information(gradients: Stream, device: torch.device) -> Tensor:
    """The sum of g g^T over all positions, float32 [hidden, hidden]."""
    hidden = gradients.states.shape[-1]
    total = torch.zeros(hidden, hidden, device=device)
    for part in gradients.batches():
        g = gradients.states[part].to(device).float().flatten(0, 1)
        accumulate_(total, g, g)
    return total


def _directions(information: Tensor, name: str) -> Tensor:
    trace = float(information.trace())
    if not 0 < trace < float("inf"):
        raise NumericsError(f"{name}: the gradients at its output are not finite, or all zero; use --quality fast")
    values, vectors = torch.linalg.eigh(information * (len(information) / trace))  # in rising order
    count = min(DIRECTIONS, len(values) - 1)
    rest = values[:-count].clamp(min=0).mean()
    beyond = (1 - EVEN) * (values[-count:] - rest).clamp(min=0)
    directions: Tensor = (vectors[:, -count:] * beyond.sqrt()).contiguous().cpu()
    return directions
