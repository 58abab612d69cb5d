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
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calibration.tokens import TokenSet
from quantkit.errors import NumericsError
from quantkit.hardware.batching import TOKENS_A_STEP
from quantkit.hardware.matmul import accumulate_, linear
from quantkit.model.streaming import (
    StreamedModel,
    logits,
    outside_loaded,
    read_outside,
    run_layer,
)
from quantkit.pipeline.activations import Stream, few_positions
from quantkit.pipeline.forward import (
    Progress,
    embed_original,
    ending_names,
    layer_loaded,
    loaded,
    open_states,
)

TOKENS = 2**14  # that speak for all: a few times the hidden sizes that there are
DIRECTIONS = 256  # kept for each layer; what is left over counts in all directions alike
EVEN = 0.1  # share of the weight that is spread over all directions: F is an estimate


@torch.no_grad()
def output_directions(
    model: StreamedModel, tokens: TokenSet, device: torch.device, dtype: torch.dtype, progress: Progress, spill: Path
) -> list[Tensor]:
    """For each layer the directions [hidden, k] of its output that matter, as `weighted_square` takes them, on the CPU.

    spill: see `activations.open_stream`; one file for each layer in turn

    Raises:
        NumericsError: a gradient is not finite.
    """
    tokens = _some(tokens)
    batch = None if device.type == "cpu" else max(1, TOKENS_A_STEP // tokens.seqlen)
    entering = [open_states(model, tokens, dtype, device, spill, "file", batch) for _ in range(len(model.layers) + 1)]
    embed_original(model, tokens, entering[0], device)
    for index in range(len(model.layers)):
        progress.ending(f"see what matters to the original model: layer {index + 1}")
        with layer_loaded(model, index, device, dtype):
            for part in entering[index].batches():
                hidden = entering[index].states[part].to(device)
                entering[index + 1].states[part] = run_layer(model, index, hidden, exact=False)
    gradients = entering.pop()
    _start_back(model, gradients, device, dtype)
    found = [_directions(_information(gradients, device), model.layer_name(len(entering) - 1))]
    for index in reversed(range(1, len(entering))):
        progress.ending(f"see what matters to the original model: back through layer {index + 1}")
        with layer_loaded(model, index, device, dtype):
            _step_back(model, index, entering.pop(), gradients, device)
        found.append(_directions(_information(gradients, device), model.layer_name(index - 1)))
    return found[::-1]


def spilled_bytes(model: StreamedModel, tokens: TokenSet, dtype: torch.dtype) -> int:
    """What `output_directions` takes of the disk while it works: what enters each layer, and what leaves the last."""
    return (len(model.layers) + 1) * _some(tokens).input_ids.numel() * int(model.config.hidden_size) * dtype.itemsize


def _some(tokens: TokenSet) -> TokenSet:
    stride = max(1, tokens.input_ids.numel() // TOKENS)
    return replace(tokens, input_ids=tokens.input_ids[::stride])


def weighted_square(error: Tensor, directions: Tensor) -> Tensor:
    """The mean of e^T F e over all positions of error [..., hidden], F scaled to a mean eigenvalue of 1; a scalar.

    directions: V [hidden, k], which stands for F = V V^T + c I
    """
    even = 1 - directions.square().sum() / len(directions)
    return (linear(error, directions.T).square().sum(-1) + even * error.square().sum(-1)).mean()


def _start_back(model: StreamedModel, states: Stream, device: torch.device, dtype: torch.dtype) -> None:
    """Replace what leaves the last layer by the gradient there of log p(y), y drawn from p; in place."""
    generator = torch.Generator(device).manual_seed(0)
    with outside_loaded(model, loaded(read_outside(model, ending_names(model)), device, dtype)):
        for part in states.batches():
            for some in few_positions(states.states[part], model.config.vocab_size):
                hidden = states.states[part, some].to(device).requires_grad_()
                with torch.enable_grad():
                    chances = logits(model, hidden).float().log_softmax(-1)
                drawn = torch.multinomial(chances.exp().flatten(0, 1), 1, generator=generator)
                with torch.enable_grad():
                    likelihood = chances.flatten(0, 1).gather(1, drawn).sum()
                states.states[part, some] = torch.autograd.grad(likelihood, hidden)[0]


def _step_back(model: StreamedModel, index: int, entering: Stream, gradients: Stream, device: torch.device) -> None:
    """Turn the gradients at the output of the materialised layer into those at its input, in place."""
    for part in gradients.batches():
        hidden = entering.states[part].to(device).requires_grad_()
        with torch.enable_grad():
            output = run_layer(model, index, hidden, exact=False)
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
    kept = min(DIRECTIONS, len(values) - 1)
    rest = values[:-kept].clamp(min=0).mean()
    beyond = (1 - EVEN) * (values[-kept:] - rest).clamp(min=0)
    found: Tensor = (vectors[:, -kept:] * beyond.sqrt()).contiguous().cpu()
    return found
